"""The operators as torch sees them: schemas, fakes, torch.compile, backend choice, bad input."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from gpu_backends import skip_if_values_are_not_read
from op_cases import Case, build

from pykvcache import operators, ops

READY = [name for name, status in ops.backends().items() if status == "ready"]
EVERYTHING = Case(
    "everything", rows=((1, 20), (3, 9)), head_dim=32, softcap=5.0, sinks=True, alibi=True,
    window=7, bias="float",
)  # fmt: skip


def _positional(case: Case) -> tuple[Any, ...]:
    """Arguments of the operator itself, in schema order."""
    data = build(case)
    kwargs = data.kwargs
    return (
        *data.args,
        *(kwargs[n] for n in ("scale", "causal", "window", "chunk", "softcap", "sinks")),
        *(kwargs[n] for n in ("alibi_slopes", "bias", "k_scale", "v_scale")),
        case.v_head_dim or case.head_dim,
        None,
        False,
    )


def operators_of(backend: str) -> Any:
    """As torch has them."""
    return getattr(torch.ops, f"pykvcache_{backend}")


@pytest.mark.parametrize("backend", READY)
class TestOpcheck:
    def test_paged_attention(self, backend: str) -> None:
        op = operators_of(backend).paged_attention.default
        torch.library.opcheck(op, _positional(EVERYTHING))
        torch.library.opcheck(op, _positional(Case("latent", latent=True, num_kv_heads=1)))

    def test_write_kv(self, backend: str) -> None:
        k, cache = torch.randn(3, 2, 8), torch.zeros(4, 2, 4, 8)
        args = (k, k, cache, cache.clone(), torch.tensor([0, -1, 7]))
        torch.library.opcheck(operators_of(backend).write_kv.default, (*args, None, None))
        fp8 = [cache.to(torch.float8_e4m3fn), cache.to(torch.float8_e4m3fn)]
        scales = [torch.ones(4, 2, 4), torch.ones(4, 2, 4)]
        checks = (
            "test_autograd_registration",
            "test_faketensor",
        )  # the others multiply fp8 tensors
        torch.library.opcheck(
            operators_of(backend).write_kv.default,
            (k, k, *fp8, args[4], *scales),
            test_utils=checks,
        )

    def test_merge_copy_gather_slots_plan(self, backend: str) -> None:
        table = operators_of(backend)
        torch.library.opcheck(
            table.merge_states.default, (torch.randn(2, 3, 4, 8), torch.randn(2, 3, 4))
        )
        a, b = torch.randn(5, 2, 4, 8), torch.randn(5, 2, 4, 8)
        copies = [a.clone(), b.clone()]
        torch.library.opcheck(table.copy_blocks.default, ([a, b], copies, torch.tensor([[0, 1]])))
        blocks, lengths = torch.tensor([[0, 3], [2, -1]]).int(), torch.tensor([7, 2]).int()
        starts = torch.tensor([0, 7, 9]).int()
        torch.library.opcheck(table.gather_kv.default, (a, b, blocks, lengths, starts, 9))
        torch.library.opcheck(table.slot_mapping.default, (blocks, lengths, starts, 9, 4))
        torch.library.opcheck(table.plan.default, (lengths, starts, 7, 4, 2, 8, 0, 0, False))


@pytest.mark.parametrize("backend", READY)
def test_compiled_step_equals_eager(backend: str) -> None:
    """Writing, mapping and attending in one full graph, without a break."""
    data = build(Case("compile", rows=((1, 20), (3, 9)), head_dim=32))
    q, k_cache, v_cache, table, lengths, starts, longest = data.args

    def step(q: torch.Tensor, k: torch.Tensor, *pools: torch.Tensor) -> torch.Tensor:
        slots = ops.slot_mapping(table, lengths, starts, len(q), 16, backend=backend)
        ops.write_kv(k, k, *pools, slots, backend=backend)
        out, lse = ops.paged_attention(q, *pools, table, lengths, starts, longest, backend=backend)
        return ops.merge_states(out[None], lse[None], backend=backend)[0]

    k = torch.randn(4, 2, 32)
    eager = step(q, k, k_cache.clone(), v_cache.clone())
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    pools = k_cache.clone(), v_cache.clone()
    assert torch.equal(compiled(q, k, *pools), eager)
    assert torch.equal(compiled(q * 2, k, *pools), step(q * 2, k, *pools))


@pytest.mark.parametrize("backend", READY)
def test_backward_is_an_error_and_not_a_missing_gradient(backend: str) -> None:
    data = build(Case("gradient"))
    q = data.args[0].clone().requires_grad_()
    out, _ = ops.paged_attention(q, *data.args[1:], backend=backend)
    with pytest.raises(RuntimeError, match="has no gradient"):
        out.sum().backward()
    cache = torch.zeros(2, 2, 4, 8)
    k = torch.ones(1, 2, 8, requires_grad=True)
    ops.write_kv(k, k, cache, cache, torch.tensor([3]), backend=backend)
    assert not cache.requires_grad and cache.sum() == 16


def test_plan_is_accepted() -> None:
    for backend in READY:
        data = build(EVERYTHING)
        lengths, starts, longest = data.args[4:]
        plan = ops.plan(lengths, starts, longest, 4, 2, 32, window=7, backend=backend)
        assert plan.dtype == torch.int32
        with_plan = ops.paged_attention(*data.args, **data.kwargs, plan=plan, backend=backend)
        without = ops.paged_attention(*data.args, **data.kwargs, backend=backend)
        assert torch.equal(with_plan[0], without[0])


def test_signature_drift_is_an_import_error() -> None:
    good = operators.schema_types(torch.ops.pykvcache_reference.merge_states.default._schema)
    operators.check_signatures([f"merge_states{good}"], "reference")
    with pytest.raises(ImportError, match="merge_states takes"):
        operators.check_signatures(["merge_states(Tensor,int)->(Tensor,Tensor)"], "reference")


@pytest.mark.skipif("cpu" not in READY, reason="needs the compiled extension")
def test_every_schema_is_compiled() -> None:
    from pykvcache import _C

    assert sorted(s.partition("(")[0] for s in _C.signatures()) == sorted(operators.SCHEMAS)


def test_backend_names() -> None:
    with pytest.raises(ValueError, match="backend must be 'auto' or one of"):
        ops.table("gpu", "cpu")
    for name, status in ops.backends().items():
        if status != "ready":
            with pytest.raises(RuntimeError, match=f"backend '{name}' is not available: "):
                ops.table(name, "cpu")


def test_without_the_extension_auto_is_the_reference_and_says_so() -> None:
    script = """
import sys, warnings
sys.modules["pykvcache._C"] = None
from pykvcache import ops
assert "not built" in ops.backends()["cpu"], ops.backends()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert ops.table("auto", "cpu").backend == "reference"
assert "slow reference" in str(caught[0].message)
try:
    ops.table("cpu", "cpu")
except RuntimeError as error:
    assert "pip install" in str(error)
else:
    raise SystemExit("an explicit choice fell back")
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def _change(index: int, value: Any) -> Any:
    return lambda args: (*args[:index], value, *args[index + 1 :])


BAD_CALLS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "q dims": (_change(0, torch.zeros(4, 64)), {}, r"q must be \[T, HQ, D\]"),
    "q dtype": (_change(0, torch.zeros(4, 4, 64).long()), {}, "q must be float32"),
    "q dim": (_change(0, torch.zeros(4, 4, 32)), {}, "D is"),
    "no heads": (_change(0, torch.zeros(4, 0, 64)), {}, "HQ must be a multiple of HKV"),
    "head count": (_change(0, torch.zeros(4, 3, 64)), {}, "HQ must be a multiple of HKV"),
    "cache dims": (_change(1, torch.zeros(4, 4)), {}, "k_cache must be"),
    "cache blocks": (_change(2, torch.zeros(2, 2, 16, 64)), {}, "v_cache must be.*num_blocks"),
    "cache dtype": (_change(2, torch.zeros(7, 2, 16, 64).half()), {}, "v_cache must"),
    "other float8": (
        _change(1, torch.zeros(7, 2, 16, 64).to(torch.float8_e5m2)),
        {},
        "k_cache must be float32.*float8_e4m3fn, got float8_e5m2",
    ),
    "table dtype": (_change(3, torch.zeros(2, 4).long()), {}, "block_table must be int32"),
    "table rows": (_change(3, torch.zeros(3, 4).int()), {}, "B is"),
    "block id": (_change(3, torch.full((2, 4), 99).int()), {}, "99"),
    "lens dtype": (_change(4, torch.zeros(2).long()), {}, "seq_lens must be int32"),
    "too long": (_change(4, torch.tensor([20, 900]).int()), {}, "900"),
    "negative": (_change(4, torch.tensor([20, -1]).int()), {}, "-1"),
    "starts dtype": (_change(5, torch.tensor([0, 1, 4])), {}, "cu_seqlens_q must be int32"),
    "starts size": (_change(5, torch.tensor([0, 4]).int()), {}, "cu_seqlens_q must be"),
    "starts end": (_change(5, torch.tensor([0, 1, 3]).int()), {}, "cu_seqlens_q"),
    "starts order": (
        _change(5, torch.tensor([0, 5, 4]).int()),
        {},
        "cu_seqlens_q|max_seqlen_q is 3",
    ),
    "max": (_change(6, 1), {}, "max_seqlen_q is 1"),
    "window": (None, {"window": -1}, "window must not be negative, got -1"),
    "chunk": (None, {"chunk": -4}, "chunk must not be negative, got -4"),
    "softcap": (None, {"softcap": -1.0}, "softcap must not be negative"),
    "softcap inf": (None, {"softcap": float("inf")}, "softcap must be finite, got inf"),
    "scale nan": (None, {"scale": float("nan")}, "scale must be finite, got nan"),
    "sinks": (None, {"sinks": torch.zeros(3)}, "sinks must be"),
    "slopes": (None, {"alibi_slopes": torch.zeros(4, 1)}, "alibi_slopes must be"),
    "bias": (None, {"bias": torch.zeros(2, 4, 3, 5)}, "bias must broadcast"),
    "bias dims": (None, {"bias": torch.zeros(3, 20)}, "bias must broadcast"),
    "scale": (None, {"k_scale": torch.zeros(9)}, "k_scale must have shape"),
    "layout": (None, {"layout": "DHN"}, "layout must be one of HND, NHD"),
    "v_head_dim": (None, {"v_head_dim": 65}, "v_head_dim must be 1 to 64, got 65"),
    "no v": (_change(2, None), {}, "v_head_dim must be given"),
}


BAD_VALUES = ("block id", "too long", "negative", "starts end", "starts order", "max", "bias")


@pytest.mark.parametrize("backend", READY)
@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_call_is_one_readable_line(backend: str, name: str) -> None:
    if name in BAD_VALUES:
        skip_if_values_are_not_read(backend)
    change, kwargs, message = BAD_CALLS[name]
    args = build(Case("good", rows=((1, 20), (3, 9)))).args
    with pytest.raises((ValueError, TypeError), match=message) as error:
        ops.paged_attention(*(change(args) if change else args), **kwargs, backend=backend)
    assert "\n" not in str(error.value)


def test_a_torch_that_says_runtime_error_for_bad_arguments_is_corrected() -> None:
    """As torch 2.15 does; a defect of torch or of a kernel stays what it is."""
    noted = ["too many heads"]
    take = lambda: noted.pop() if noted else ""  # noqa: E731

    def operator(text: str) -> None:
        raise RuntimeError(text)

    named = operators._naming(operator, take)
    with pytest.raises(ValueError, match=r"^too many heads$"):
        named("too many heads")
    with pytest.raises(RuntimeError, match="too many heads"):  # not noted this time
        named("too many heads")
    noted.append("an older one")
    with pytest.raises(RuntimeError, match="out of memory"):
        named("out of memory")


def test_kernels_note_what_was_wrong_with_an_argument_for_their_own_thread() -> None:
    from pykvcache import _C

    def fail() -> str:
        with pytest.raises((ValueError, RuntimeError)) as error:
            torch.ops.pykvcache_cpu.merge_states(torch.empty(3), torch.empty(0))
        return str(error.value)

    _C.take_bad_argument()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(fail).result()
        assert _C.take_bad_argument() == ""
        text = fail()
        assert _C.take_bad_argument() == text != ""
        assert _C.take_bad_argument() == ""
        assert pool.submit(_C.take_bad_argument).result() == text
