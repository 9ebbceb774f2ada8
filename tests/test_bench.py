"""The code behind benchmarks and commands: traces, timing, cases, and refusing wrong results."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import torch

from pykvcache.bench import cases, generate, kernels, models, peaks
from pykvcache.bench.cases import Case, Heads
from pykvcache.bench.demo import dense_bytes, prompt_lengths
from pykvcache.bench.timing import Timing, WrongResult, interleave, take_turns
from pykvcache.bench.traces import FOLDER, TRACES, Request, read_trace

ROWS = {"azure-code": 8_819, "azure-conv": 19_366, "mooncake-conv": 12_031, "sharegpt": 30_731}
LONGEST = {"azure-code": 7_841, "azure-conv": 14_089, "mooncake-conv": 126_527, "sharegpt": 8_149}
SMALL = Heads("small", 4, 2, 16)


@pytest.mark.parametrize("name", TRACES)
def test_packaged_traces_are_whole(name: str) -> None:
    requests = list(read_trace(name))
    assert len(requests) == ROWS[name]
    assert max(request.prompt + request.output for request in requests) == LONGEST[name]


def test_every_packaged_trace_has_source_and_licence() -> None:
    readme = (FOLDER / "README.md").read_text()
    assert len(list((FOLDER / "LICENSES").iterdir())) == 3
    for file in TRACES.values():
        assert f"`{file}`" in readme


def test_traces_of_the_user(tmp_path: Path) -> None:
    table = tmp_path / "mine.csv"
    table.write_text("other,output_length,input_length\nx,2,1\ny,4,3\n")
    lines = tmp_path / "mine.jsonl.gz"
    with gzip.open(lines, "wt") as file:
        file.write(
            '{"input_length": 1, "output_length": 2}\n{"input_length":3,"output_length":4}\n'
        )
    assert list(read_trace(table)) == list(read_trace(lines)) == [Request(1, 2), Request(3, 4)]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "input_length,other\n1,2\n", "a.csv must have the columns .*input_length,other"),
        ("a.csv", "input_length,output_length\n1,2\n3,-4\n", "line 3: output .* got '-4'"),
        ("a.csv", "input_length,output_length\n1\n", "line 2: output .* got None"),
        ("a.jsonl", '{"input_length": 1, "output_length": 2}\n{}\n', "a.jsonl, line 2: must be"),
        ("a.jsonl", '{"input_length": "x", "output_length": 2}\n', "line 1: prompt .* got 'x'"),
        ("a.jsonl", "input\n", "a.jsonl, line 1: must be a JSON object"),
    ],
)
def test_bad_traces_are_named_by_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        list(read_trace(path))
    assert "\n" not in str(caught.value)


def test_unknown_trace_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"azure-code, .*sharegpt, got 'sharedgpt'"):
        list(read_trace("sharedgpt"))


def test_timing_quantiles() -> None:
    timing = Timing.of([float(i) for i in range(11)])
    assert (timing.median, timing.p10, timing.p90, timing.samples) == (5, 1, 9, 11)
    assert timing.over(5).median == 1


def test_interleave_gives_every_contender_its_own_running_numbers() -> None:
    seen: dict[str, list[int]] = {"a": [], "b": []}

    def contender(name: str):
        def run(number: int) -> None:
            seen[name].append(number)
            torch.randn(400, 400) @ torch.randn(400, 400)

        return run

    timings = interleave({name: contender(name) for name in seen}, seconds=0)
    for name, numbers in seen.items():
        assert timings[name].samples >= 3
        assert timings[name].p10 <= timings[name].median <= timings[name].p90
        timed = numbers[len(numbers) - numbers[::-1].index(0) - 1 :]
        assert timed == list(range(len(timed)))


def test_take_turns_rotates_the_order() -> None:
    order: list[str] = []
    steps: list[int] = []
    contenders = {name: lambda _, name=name: order.append(name) for name in "abc"}
    timings = take_turns(contenders, 3, advance=lambda: steps.append(1))
    assert order == list("abcbcacab")
    assert len(steps) == 9 and all(timing.samples == 3 for timing in timings.values())


def test_work_of_a_case() -> None:
    decode = Case("decode", cases.HEADS["gqa"], torch.bfloat16, 8, 4096)
    assert decode.kv_bytes == 8 * 4096 * 2 * 8 * 128 * 2
    prefill = Case("prefill", cases.HEADS["mha"], torch.float32, 1, 2048)
    assert prefill.flops == 2 * 2048**2 * 64 * 16  # causal: 2 L^2 D HQ
    assert {case.phase for case in cases.select(quick=True)} == {"decode", "prefill"}
    assert len(cases.select()) > len(cases.select(quick=True))


@pytest.fixture
def small_case(monkeypatch: pytest.MonkeyPatch):
    """Cases that take milliseconds, over three copies."""
    monkeypatch.setattr(peaks, "READ_BYTES", 2**20)
    monkeypatch.setattr(peaks, "GEMM_SIZE", 64)

    def make(phase: str, dtype: torch.dtype) -> Case:
        case = Case(phase, SMALL, dtype, 2, 80)
        monkeypatch.setattr(kernels, "COLD_BYTES", 3 * case.kv_bytes)
        monkeypatch.setitem(cases.DTYPES, "test", dtype)
        return case

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_kernel_results_are_checked_and_complete(small_case, phase: str, dtype) -> None:
    results = list(kernels.measure(small_case(phase, dtype), [16, 32], [1], seconds=0.01))
    names = [result.contender for result in results]
    folded = ["folded"] if phase == "decode" else []
    loads = ["loads in order", "loads 16", "loads 32"] if phase == "decode" else []
    assert names == ["sdpa", *folded, "paged 16", "paged 32", *loads]
    baseline = next(r for r in results if r.contender == ("folded" if folded else "sdpa"))
    assert baseline.speedup == 1
    for result in results:
        work = result.case.kv_bytes if phase == "decode" else result.case.flops
        assert result.rate == pytest.approx(work / result.timing.median)
        assert result.to_json()["threads"] == 1


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_wrong_kernel_gets_no_figure(
    small_case, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    attention = kernels.ops.paged_attention

    def slightly_wrong(*arguments, backend, **options):
        out, lse = attention(*arguments, backend=backend, **options)
        if backend != "reference":
            out[-1, -1, -1] += 0.01
        return out, lse

    monkeypatch.setattr(kernels.ops, "paged_attention", slightly_wrong)
    results = kernels.measure(small_case(phase, torch.float32), [16], [1], seconds=0.01)
    with pytest.raises(WrongResult, match=f"{phase} small .* paged 16 is off by 0.01"):
        next(results)


def test_nan_is_a_wrong_result(small_case, monkeypatch: pytest.MonkeyPatch) -> None:
    workload = kernels.Workload(small_case("decode", torch.float32), [16])
    workload.contenders["paged 16"] = lambda _: torch.full_like(workload.packed_q, torch.nan)
    with pytest.raises(WrongResult, match="off by nan"):
        workload.check()


def test_paged_and_dense_copies_are_all_the_same(small_case) -> None:
    workload = kernels.Workload(small_case("decode", torch.float32), [16])
    assert workload.copies == 3
    outputs = [workload.contenders["paged 16"](call) for call in range(3)]
    for out in outputs[1:]:
        assert torch.equal(out, outputs[0])


def test_workloads_are_those_that_the_figures_name() -> None:
    totals = {name: sum(w.prompt_lengths()) for name, w in generate.WORKLOADS.items()}
    assert totals == {"mixed": 4_752, "long": 38_400}
    for workload in generate.WORKLOADS.values():
        lengths = workload.prompt_lengths()
        assert len(lengths) == 32
        assert workload.shortest <= min(lengths) <= max(lengths) <= workload.longest


def test_generate_benchmark_measures_all_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    build = models.build_llama
    monkeypatch.setattr(
        generate.models,
        "build_llama",
        lambda *sizes: build(32, 64, 2, 4, 2, 128, *sizes[6:]),
    )
    workload = generate.Workload("tiny", 4, 40, output=5, seed=0, batch=6)
    steps: list[int] = []
    result = generate.measure(workload, repeats=1, block_size=8, advance=lambda: steps.append(1))
    assert len(steps) == 3
    assert set(result.timings) == {"unpatched", "patched", "no attention"}
    lengths = workload.prompt_lengths()
    block_bytes = 2 * 2 * 2 * 8 * 8 * 2  # layers, K and V, KV heads, slots, head dim, bf16
    blocks = sum(-(-(length + 4) // 8) for length in lengths)
    assert result.used_bytes == blocks * block_bytes
    assert result.padded_bytes == 6 * (max(lengths) + 5) * block_bytes // 8
    assert result.pool_bytes >= result.used_bytes


def test_generate_benchmark_refuses_wrong_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.build_llama(32, 64, 1, 2, 1, 64, torch.bfloat16)
    run = generate.generate

    def spoil(model, inputs, new_tokens):
        output = run(model, inputs, new_tokens)
        output.sequences[0, -1] += "_pykvcache_patch" in vars(model)
        return output

    monkeypatch.setattr(generate, "generate", spoil)
    with pytest.raises(WrongResult, match="nothing was timed"):
        generate.check_tokens(model, [3, 5], block_size=4)
    assert model.dtype == torch.bfloat16


def test_random_prompts_are_padded_on_the_left() -> None:
    inputs = models.random_prompts([2, 4], vocabulary=50)
    assert inputs["attention_mask"].tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert inputs["input_ids"][0, :2].tolist() == [0, 0]
    assert (inputs["input_ids"][inputs["attention_mask"] == 1] > 0).all()


def test_demo_prompts_follow_the_trace() -> None:
    lengths = prompt_lengths(200, seed=1)
    assert lengths == prompt_lengths(200, seed=1) != prompt_lengths(200, seed=2)
    assert min(lengths) >= 4 and max(lengths) <= 768 and len(set(lengths)) > 50


def test_dense_bytes_counts_padding_as_waste() -> None:
    from transformers.cache_utils import DynamicCache

    cache = DynamicCache()
    cache.update(torch.zeros(2, 3, 10, 4), torch.zeros(2, 3, 10, 4), 0)
    held, needed = dense_bytes(cache, [10, 5])
    assert held == 2 * 2 * 3 * 10 * 4 * 4
    assert needed == held * 15 // 20


def test_block_reader_reads_the_blocks_of_its_call() -> None:
    storage = torch.arange(8 * 256, dtype=torch.float32).view(8, 256)
    tables = torch.tensor([[[5, 2]], [[0, 7]]], dtype=torch.int32)
    read = peaks.block_reader(storage, tables)
    for call in range(3):
        assert read(call) == storage[tables[call % 2].flatten()].sum().item()


def test_read_contenders_read_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "READ_BYTES", 2**22)
    for read in peaks.read_contenders().values():
        assert float(torch.as_tensor(read(0)).sum()) == 2**20
