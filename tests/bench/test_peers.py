"""Attention of other libraries as contenders: checked, or missing for a reason that is told."""

from __future__ import annotations

import sys
import warnings
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch

from pykvcache import ops
from pykvcache.bench import kernels, peers, tensors, transformers_paged
from pykvcache.bench.cases import Case, Heads
from pykvcache.bench.timing import Missing, WrongResult

SMALL = Heads("gqa", 4, 2, 16)


def test_peers_that_cannot_run_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("decode", SMALL, torch.float32, 1, 32)
    workload = kernels.Workload(case, [16], peers=("sdpa-backends", "flashinfer"))
    assert workload.missing == {"sdpa-backends": "needs a GPU", "flashinfer": "needs a GPU"}

    def broken(*args: object, **kwargs: object) -> object:
        raise RuntimeError("no compiler\nlong story")

    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: broken)
    with pytest.raises(Missing, match=r"does not run here: no compiler$"):
        peers.flex(workload)


def test_another_version_of_a_peer_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    library = ModuleType("flashinfer")
    library.__spec__ = ModuleSpec("flashinfer", None)
    library.BatchDecodeWithPagedKVCacheWrapper = SimpleNamespace  # takes no such arguments
    monkeypatch.setitem(sys.modules, "flashinfer", library)
    half = kernels.Workload(Case("decode", SMALL, torch.bfloat16, 1, 32), [16])
    half.device = SimpleNamespace(type="cuda")
    with pytest.raises(Missing, match="does not run here"):
        peers.flashinfer(half)


class PagedWrapper:
    """FlashInfer's wrappers by the reference, on the CPU."""

    def __init__(self, workspace: torch.Tensor, layout: str, use_tensor_cores=None) -> None:
        assert layout == "HND" and use_tensor_cores

    def plan(self, indptr, pages, last_page_len, heads, kv_heads, dim, page_size, **dtypes) -> None:
        counts = indptr.diff()
        self.lengths = (counts - 1) * page_size + last_page_len
        rows = pages.split(counts.tolist())
        self.table = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
        self.starts = torch.arange(len(counts) + 1, dtype=torch.int32)

    def run(self, q: torch.Tensor, caches: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        arguments = (self.table, self.lengths, self.starts, 1)
        return ops.paged_attention(q, *caches, *arguments, backend="reference")[0]


def test_flashinfer_decodes_rows_of_any_length_on_tensor_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    library = SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=PagedWrapper)
    for groups in (((1, 90), (2, 16), (1, 1)), ((2, 70),)):
        case = Case.of("decode", SMALL, torch.bfloat16, groups)
        monkeypatch.setattr(tensors, "COLD_BYTES", 3 * case.kv_bytes)
        workload = kernels.Workload(case, [8])
        run = peers._plan_flashinfer(library, workload)
        assert workload.copies == 3
        workload.contenders["flashinfer"] = run
        workload.check()
        assert torch.equal(run(0), run(1))


@pytest.mark.parametrize(
    ("phase", "batch", "length"), [("decode", 1, 64), ("decode", 3, 70), ("prefill", 2, 40)]
)
def test_paged_attention_of_transformers_is_a_checked_contender(
    monkeypatch: pytest.MonkeyPatch, phase: str, batch: int, length: int
) -> None:
    monkeypatch.setattr(tensors, "COLD_BYTES", 2**17)
    case = Case(phase, SMALL, torch.float32, batch, length)
    workload = kernels.Workload(case, [16], peers=("transformers",))
    assert workload.missing == {} and workload.copies > 2
    workload.check()
    right = workload.contenders["transformers paged"](0)
    assert right.shape == (batch * case.query_len, 4, 16)
    workload.contenders["transformers paged"] = lambda call: 1.01 * right
    with pytest.raises(WrongResult, match="transformers paged is off by"):
        workload.check()


def test_paged_attention_of_transformers_that_is_too_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("decode", SMALL, torch.float32, 2, 32)
    monkeypatch.setattr(tensors, "COLD_BYTES", 2**14)
    monkeypatch.setattr(transformers_paged, "MOST_CALL_SECONDS", 0)
    missing = kernels.Workload(case, [16], peers=("transformers",)).missing
    assert missing["transformers"].endswith("s a call in decode gqa fp32 B=2 L=32")
    monkeypatch.setattr(transformers_paged, "MOST_MASK_ELEMENTS", 8)
    missing = kernels.Workload(case, [16], peers=("transformers",)).missing
    assert missing["transformers"].startswith("would need a mask of 2 x 64 in decode")
    monkeypatch.setattr(transformers_paged, "paged", lambda workload: 1 / 0)
    missing = kernels.Workload(case, [16], peers=("transformers",)).missing
    assert missing["transformers"] == "does not run here: division by zero"


def test_every_reason_of_a_missing_peer_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "COLD_BYTES", 2**14)
    monkeypatch.setattr(kernels, "_timed", lambda *args: [])
    monkeypatch.setattr(transformers_paged, "MOST_MASK_ELEMENTS", 8)
    missing: dict[str, str] = {}
    for length in (32, 64, 64):
        case = Case("decode", SMALL, torch.float32, 1, length)
        names = ("transformers", "flashinfer")
        list(kernels.measure(case, [16], [1], 0.0, peers=names, missing=missing))
    assert missing["flashinfer"] == "needs a GPU"
    assert missing["transformers"].count("would need a mask") == 2


@pytest.mark.slow
@torch._dynamo.config.patch(recompile_limit=1)  # monkeypatch would delete the option at its end
def test_flex_is_a_checked_contender_and_never_unfused() -> None:
    for length in (160, 192):  # the second is beyond the limit, had the first not been forgotten
        case = Case("decode", SMALL, torch.float32, 1, length)
        workload = kernels.Workload(case, [16], peers=("flex",))
        if "flex" in workload.missing:
            pytest.skip(workload.missing["flex"])
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="flex_attention called without")
            workload.check()
        assert "flex" in workload.contenders
