"""Ways to share out decode of rows of different lengths, as `bench kernels` times them beside."""

from __future__ import annotations

import pytest
import torch
from gpu_backends import GPU_BACKENDS

from pykvcache import ops
from pykvcache.bench import kernels, tensors
from pykvcache.bench.cases import DTYPES, Case, Heads

READY = [name for name in GPU_BACKENDS if ops.backends()[name] == "ready"]
ROWS = ((1, 700), (2, 100), (1, 1))
GROUP_OF_8 = Heads("group-8", 16, 2, 128)


def mixed(dtype: torch.dtype) -> Case:
    return Case.of("decode", GROUP_OF_8, dtype, ROWS)


@pytest.fixture(autouse=True)
def _one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "COLD_BYTES", 1)


@pytest.mark.parametrize("backend", READY)
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_every_partition_is_right(dtype: str, backend: str) -> None:
    workload = kernels.Workload(mixed(DTYPES[dtype]), [16], [backend])
    paged = ["paged 16", "paged 16 equal splits", "paged 16 fixed splits"]
    assert list(workload.contenders) == ["sdpa", "folded", *paged]
    assert "plan" in workload.others
    workload.check()


def test_equal_splits_give_every_row_as_much_as_the_longest() -> None:
    plan = torch.tensor([0, 11, 13, 15, 16], dtype=torch.int32)
    assert kernels.equal_shares(plan).tolist() == [0, 11, 22, 33, 44]


def test_a_plan_is_made_before_and_not_in_a_timed_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend of this test has plans and is the CPU's for the rest."""
    made, used = [], []
    attention = ops.paged_attention

    def plan(*arguments: object, deterministic: bool, backend: str) -> torch.Tensor:
        made.append(deterministic)
        return torch.tensor([0, 11, 13, 15, 16], dtype=torch.int32)

    def attend(*arguments, plan=None, deterministic=False, backend, **options):
        used.append((plan.tolist(), deterministic))
        return attention(*arguments, backend="cpu", **options)

    monkeypatch.setattr(ops, "plan", plan)
    monkeypatch.setattr(ops, "paged_attention", attend)
    workload = kernels.Workload(mixed(torch.bfloat16), [16, 32], ["some", "other"])
    assert made == [False, True, False, True]
    for name, run in workload.contenders.items():
        if name.startswith("paged 32 other"):
            run(0)
    even, equal = [0, 11, 13, 15, 16], [0, 11, 22, 33, 44]
    assert used == [(even, False), (equal, False), (even, True)]
    assert len(made) == 4
    workload.others["plan other"](0)
    assert len(made) == 5
