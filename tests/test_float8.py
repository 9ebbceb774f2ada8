"""Float8 caches with numbers of any size, on every backend.

Two backends multiply float8 as float16, whatever q is: what float16 cannot hold is measured in
units, and must come out as if there were none.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from op_cases import Case, build
from torch import Tensor

from pykvcache import ops

READY = [name for name, status in ops.backends().items() if status == "ready"]
F16, BF16, FP8 = torch.float16, torch.bfloat16, torch.float8_e4m3fn
PHASES = {"decode": ((1, 70), (2, 150)), "prefill": ((30, 50), (7, 40))}


def case_of(phase: str, dim: int, **kwargs: object) -> Case:
    return Case("float8", PHASES[phase], 8, 2, dim, dtype=BF16, cache_dtype=FP8, **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", READY)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("exponent", [-90, 90])
@pytest.mark.parametrize("scales", ["head", "slot", "channel"])
def test_queries_may_be_of_any_size(backend: str, phase: str, scales: str, exponent: int) -> None:
    """A power of two in q and its inverse in the scale change no bit."""
    data = build(case_of(phase, 64, scales=scales))
    (q, *rest), kwargs = data.args, dict(data.kwargs)
    first = ops.paged_attention(q, *rest, **kwargs, backend=backend)
    kwargs["scale"] *= 2.0**-exponent
    again = ops.paged_attention(q * 2.0**exponent, *rest, **kwargs, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.parametrize("backend", READY)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_rows_of_queries_have_a_size_of_their_own(backend: str, phase: str, dim: int) -> None:
    case = case_of(phase, dim, scales="head")
    data = build(case)
    (q, *rest) = data.args
    sizes = 2.0 ** torch.linspace(-60, 6, q.shape[0] * q.shape[1])
    order = torch.randperm(len(sizes))
    q = (q.flatten(0, 1) * sizes[order, None]).view(q.shape).to(BF16)
    out, lse = ops.paged_attention(q, *rest, **data.kwargs, backend=backend)
    expected, expected_lse = ops.paged_attention(q.float(), *rest, **data.kwargs)
    torch.testing.assert_close(out.float(), expected, atol=0.03, rtol=0.03)
    torch.testing.assert_close(lse, expected_lse, atol=0.02, rtol=1e-3)


@pytest.mark.parametrize("backend", READY)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize(("spread", "dtype"), [(8, F16), (8, BF16), (40, BF16)])
def test_scales_of_slots_may_be_of_any_size(
    backend: str, phase: str, dim: int, spread: int, dtype: torch.dtype
) -> None:
    """Values of 2^-spread to 2^spread; the tolerance is of the largest in a row of the output."""
    case = case_of(phase, dim, scales="slot")
    data = build(replace(case, dtype=dtype))
    kwargs = dict(data.kwargs)
    shape = kwargs["v_scale"].shape
    sign = torch.where(torch.rand(shape) < 0.2, -1.0, 1.0)
    sizes = 2.0 ** torch.randint(-spread, spread + 1, shape)
    kwargs["v_scale"] = kwargs["v_scale"] * sign * sizes
    out, _ = ops.paged_attention(*data.args, **kwargs, backend=backend)
    (q, *rest) = data.args
    expected, _ = ops.paged_attention(q.float(), *rest, **kwargs)
    error = (out.double() - expected.double()).abs()
    assert (error <= 0.02 * expected.double().abs().amax(-1, keepdim=True)).all()


@pytest.mark.parametrize("backend", READY)
@pytest.mark.parametrize("phase", PHASES)
def test_small_scales_of_slots_lose_no_digits_in_float16(backend: str, phase: str) -> None:
    """Weights times scales of 4e-6 are no normal numbers of float16; times values they are."""
    case = replace(case_of(phase, 64, scales="slot"), dtype=F16)
    (q, k_cache, v_cache, *rest), kwargs = build(case).args, dict(build(case).kwargs)
    v_cache = (v_cache.float() * 64).to(FP8)
    expected, _ = ops.paged_attention(q.float(), k_cache, v_cache, *rest, **kwargs)
    kwargs["v_scale"] = kwargs["v_scale"] * 2.0**-18
    out, _ = ops.paged_attention(q, k_cache, v_cache, *rest, **kwargs, backend=backend)
    error = (out.float() * 2.0**18 - expected).abs()
    assert (error <= 4e-3 * expected.abs().amax()).all()


@pytest.mark.parametrize("backend", READY)
@pytest.mark.parametrize("tokens", [1, 18], ids=["decode", "prefill"])
@pytest.mark.parametrize("slot_scales", [False, True])
def test_many_small_weights_count(backend: str, tokens: int, slot_scales: bool) -> None:
    """One key has a weight of 1 and no value, 1,000 have e^-20 each: float16 alone has no such."""
    length, size, dim = 1001, 16, 64
    blocks = -(-length // size)
    k = torch.zeros(blocks, 1, size, dim)
    v = torch.full((blocks, 1, size, dim), 448.0)
    k[..., 0], k[0, 0, 0, 0], v[0, 0, 0] = -20.0, 0.0, 0.0
    q = torch.zeros(tokens, 1, dim)
    q[..., 0] = 1.0
    scale: Tensor | None = torch.full((blocks, 1, size), 3e5) if slot_scales else None
    lengths, starts = torch.tensor([length]).int(), torch.tensor([0, tokens]).int()
    out, _ = ops.paged_attention(
        q.to(BF16), k.to(FP8), v.to(FP8), torch.arange(blocks)[None].int(), lengths, starts,
        tokens, scale=1.0, causal=False, v_scale=scale, backend=backend,
    )  # fmt: skip
    small = (length - 1) * torch.tensor(-20.0).exp()
    expected = small / (1 + small) * 448 * (3e5 if slot_scales else 1)
    torch.testing.assert_close(out.float(), expected.expand(tokens, 1, dim), atol=0, rtol=0.01)


@pytest.mark.parametrize("backend", READY)
@pytest.mark.parametrize("phase", ["decode", "prefill"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("slot_scales", [False, True])
def test_all_codes_are_read(
    backend: str, phase: str, dtype: torch.dtype, slot_scales: bool
) -> None:
    """Rows of one key with 16 codes: values come out as they are, and a head's lse is one code.

    The last row has the two codes of NaN, and nothing else comes of it.
    """
    tokens, dim, heads = {"decode": 1, "prefill": 25}[phase], 64, 16
    codes = torch.arange(256, dtype=torch.uint8)
    finite = codes[(codes & 0x7F) != 0x7F].view(FP8).float()
    keys = torch.zeros(17, 1, 1, dim)
    keys[:16, 0, 0, :heads] = torch.cat([finite, torch.zeros(2)]).view(16, heads)
    keys[16, 0, 0, :2] = torch.tensor([0x7F, 0xFF]).to(torch.uint8).view(FP8).float()
    q = torch.eye(heads, dim).expand(17 * tokens, heads, dim).to(dtype)
    scale: Tensor | None = torch.full((17, 1, 1), 2.0) if slot_scales else None
    out, lse = ops.paged_attention(
        q, keys.to(FP8), keys.to(FP8), torch.arange(17)[:, None].int(), torch.ones(17).int(),
        torch.arange(18).int() * tokens, tokens, scale=1.0, k_scale=scale, v_scale=scale,
        backend=backend,
    )  # fmt: skip
    values = keys[:, 0, 0] * (2 if slot_scales else 1)
    out = out.view(17, tokens, heads, dim)[:, -1].float()
    lse = lse.view(17, tokens, heads)[:, -1]
    torch.testing.assert_close(lse[:16], values[:16, :heads])
    torch.testing.assert_close(out[:16], values[:16, None].expand(16, heads, dim))
    assert lse[16].isnan().all() and out[16].isnan().all()
