"""Attention implementations of configs that patched models have, and what they were before.

Models may share config objects (one config for two models; the parts of a composite model). A
config gets back what it had when the last patch that chose ours for it is undone.

Read next: pykvcache/hf/state.py.
"""

from __future__ import annotations

import weakref
from typing import Any, ClassVar

from transformers import PreTrainedConfig, PreTrainedModel

from pykvcache.hf.attention import EAGER_NAME, SDPA_NAME

OURS = (SDPA_NAME, EAGER_NAME)


class Implementations:
    """Of all configs of one patched model.

    Args:
        model: before its implementation is changed.
    """

    _live: ClassVar[weakref.WeakSet[Implementations]] = weakref.WeakSet()

    def __new__(cls, *args: Any) -> Implementations:
        """Copies of a patched model come here too: each holds the configs of its copy."""
        created = super().__new__(cls)
        cls._live.add(created)
        return created

    def __init__(self, model: PreTrainedModel) -> None:
        self._chosen: list[tuple[PreTrainedConfig, Any]] = []
        self._originals: list[tuple[PreTrainedConfig, Any]] = []
        self._originals = [(config, self._before(config)) for config in _configs(model)]

    def _before(self, config: PreTrainedConfig) -> Any:
        """What a config had before any patch that lives."""
        present = config._attn_implementation_internal
        if present in OURS:
            for other in self._others(config):
                return other.original(config)
        return present

    def _others(self, config: PreTrainedConfig) -> list[Implementations]:
        """Other patches that have chosen our implementation for a config."""
        return [
            other
            for other in list(self._live)
            if other is not self
            and any(held is config and name in OURS for held, name in other.chosen())
        ]

    def chosen(self) -> list[tuple[PreTrainedConfig, Any]]:
        """Configs and what `note_chosen` found them to have."""
        chosen: list[tuple[PreTrainedConfig, Any]] = self.__dict__.get("_chosen", [])
        return chosen  # empty while a copy is being made

    def original(self, config: PreTrainedConfig) -> Any:
        """What a config had before the model was patched; what it has, if it is not the model's."""
        for held, name in self._originals:
            if held is config:
                return name
        return config._attn_implementation_internal

    def note_chosen(self) -> None:
        """The model has its new implementation now."""
        self._chosen = [
            (config, config._attn_implementation_internal) for config, _ in self._originals
        ]

    def restore(self) -> None:
        """For good; configs that other patched models share keep ours."""
        self._chosen = []
        for config, name in self._originals:
            if not self._others(config):
                config._attn_implementation_internal = name

    def step_aside(self) -> None:
        """Give every config what it had, until `step_back`."""
        _set(self._originals)

    def step_back(self) -> None:
        """Undo `step_aside`."""
        _set(self._chosen)


def _set(implementations: list[tuple[PreTrainedConfig, Any]]) -> None:
    for config, name in implementations:
        config._attn_implementation_internal = name


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """The configs of a model and of everything in it, each once."""
    found: dict[int, PreTrainedConfig] = {}
    pending = [m.config for m in model.modules() if isinstance(m, PreTrainedModel)]
    while pending:
        config = pending.pop(0)
        if id(config) in found:
            continue
        found[id(config)] = config
        children = (getattr(config, name, None) for name in config.sub_configs)
        pending += [child for child in children if isinstance(child, PreTrainedConfig)]
    return list(found.values())
