"""Wrong arguments of `pykvcache bench ...` are one line; its help has examples."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("kernels", "--threads", "0"), "--threads must be positive integers"),
        (("kernels", "--phases", "encode"), "--phases knows decode, prefill, got 'encode'"),
        (("kernels", "--rows", "4096"), "--rows: rows must look like 32x4096"),
        (("kernels", "--rows", "1x64+1x32"), "--rows: rows of different lengths are measured in"),
        (("kernels", "--rows", "1x64", "--quick"), "--quick and --rows both choose sizes"),
        (("kernels", "--peers", "mine"), "--peers knows flex"),
        (("kernels", "--device", "tpu"), "--device must be cpu or cuda"),
        (("kernels", "--device", "cpu", "--wgmma"), "--wgmma needs a Hopper GPU"),
        (("kernels", "--json", "/no/such/folder/x"), "--json: there is no folder"),
        (("kernels", "--compare", "/no/such/file"), "--compare: /no/such/file cannot be read"),
        (("kernels", "--fail-above", "1.1"), "--fail-above needs --compare"),
        (("kernels", "--seconds", "nan"), "--seconds must be more than 0"),
        (("kernels", "--block-sizes", "999999999"), "GiB are free"),
        (("kernels", "--plot", "/proc/x"), "--plot: /proc/x is no folder"),
        (("allocator", "--seconds", "-1"), "--seconds must be more than 0"),
        (("allocator", "--json", "/tmp"), "--json: /tmp is a folder"),
        (("allocator", "--json", ""), "--json needs the name of a file"),
        (("allocator", "--json", "/proc/x"), "--json: /proc/x cannot be written"),
        (("engine", "--workload", "x"), "--workload is one of"),
        (("engine", "--capacity", "--overhead"), "two measurements"),
        (("engine", "--rows", "8"), "--rows and --steps need --overhead"),
        (("generate", "--workload", "x"), "--workload is one of"),
        (("allocator", "--num-blocks", "3"), "200000"),
        (("prefix", "--trace", "nothing"), "nothing"),
        (("nothing",), "nothing"),
    ],
)
def test_wrong_arguments_are_one_line(run, arguments: tuple[str, ...], message: str) -> None:
    code, _, err = run(*arguments)
    assert code == 2
    assert message in err and err.count("\n") == 1


@pytest.mark.parametrize("command", ["kernels", "engine", "generate", "allocator", ""])
def test_help_has_an_example(run, command: str) -> None:
    code, out, _ = run(*command.split(), "--help")
    assert code == 0 and "Example: python -m pykvcache bench" in out


@pytest.mark.parametrize("command", ["generate", "engine", "engine --overhead"])
def test_commands_that_run_models_say_what_they_need(
    run, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    find = importlib.util.find_spec

    def without(name: str, package: str | None = None) -> object:
        return None if name == "transformers" else find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    code, _, err = run(*command.split())
    assert code == 2 and "needs transformers: pip install 'pykvcache[hf]'" in err
    assert err.count("\n") == 1


def test_a_trace_is_not_written_over(run, tmp_path: Path) -> None:
    trace = tmp_path / "mine.jsonl"
    trace.write_text('{"hash_ids": [1, 2]}\n')
    code, _, err = run("prefix", "--trace", str(trace), "--json", str(trace))
    assert code == 2 and "--json and --trace are the same file" in err
    assert "hash_ids" in trace.read_text()
