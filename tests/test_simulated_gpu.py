"""The simulated GPU finds what a GPU would complain about, and GPU tests pass on it.

It changes torch for a whole process, so everything here runs in processes of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(
    torch.version.cuda is not None, reason="torch is a CUDA build, with CUDA code of its own"
)

TESTS = Path(__file__).parent
START = """
import sys, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
import simulated_gpu
simulated_gpu.install(Path({guard!r}))
x = torch.arange(6, dtype=torch.float32, device="cuda").view(2, 3)
def captured(function):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result
def message(function):
    try:
        function()
    except RuntimeError as error:
        return str(error)
    return "nothing"
"""


@pytest.fixture(scope="session")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the compiled device guard is kept."""
    return tmp_path_factory.mktemp("simulated_gpu") / "guard.so"


@pytest.fixture
def run(guard: Path) -> Callable[[str], None]:
    """Run lines of Python on the simulated GPU; they raise where something is wrong."""

    def run_lines(lines: str) -> None:
        script = START.format(tests=str(TESTS), guard=str(guard)) + lines
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]

    return run_lines


def test_tensors_compute_where_they_say(run: Callable[[str], None]) -> None:
    run("""
assert x.is_cuda and x.device == torch.device("cuda:0") and x[0].device == x.device
assert (x @ x.T).cpu().tolist() == [[5.0, 14.0], [14.0, 50.0]]
x[1, [0, 2]] = -1.0
assert x.tolist() == [[0.0, 1.0, 2.0], [-1.0, 4.0, -1.0]] and float(x.sum()) == 5.0
layer = torch.nn.Linear(3, 2).cuda()
assert layer(x).is_cuda and layer.weight.is_cuda and 7 not in x
with torch.inference_mode():
    assert layer(x).mT.is_cuda
first, second = torch.nn.Embedding(4, 3), torch.nn.Linear(3, 4, bias=False)
second.weight = first.weight
both = torch.nn.ModuleList([first, second]).cuda()
assert both[0].weight is both[1].weight
""")


def test_operands_on_two_devices_are_refused(run: Callable[[str], None]) -> None:
    run("""
wrong = "Expected all tensors to be on the same device"
assert wrong in message(lambda: x + torch.ones(2, 3))
assert wrong in message(lambda: torch.cat([x, torch.ones(2, 3)]))
assert wrong in message(lambda: torch.nn.Linear(3, 2)(x))
assert message(lambda: x + torch.tensor(1.0)) == "nothing"  # one number goes along
assert message(lambda: x.copy_(torch.ones(2, 3))) == "nothing"
""")


@pytest.mark.parametrize(
    "waits",
    [
        "x.cpu()", "x.tolist()", "float(x[0, 0])", "bool((x > 0).any())", "x[x > 1]", "x.nonzero()",
        "x.to('cpu')", "torch.ones(3).cuda()", "torch.tensor([1, 2], device='cuda')",
        "torch.unique(x)", "torch.cuda.synchronize()", "x[torch.tensor([0])]", "7 in x",
        "torch.arange(2, device='cuda').repeat_interleave(torch.ones(2, device='cuda').long())",
    ],
)  # fmt: skip
def test_what_makes_the_host_wait_is_seen(run: Callable[[str], None], waits: str) -> None:
    run(f"""
def wait(): return {waits}
assert message(wait) == "nothing"
torch.cuda.set_sync_debug_mode("error")
torch.ones(3).to("cuda", non_blocking=True); x + 1; x.sum(0); x[0]; x.clone()
assert "synchronizing" in message(wait), message(wait)
torch.cuda.set_sync_debug_mode("default")
assert "error during capture" in message(lambda: captured(wait))
assert captured(lambda: x + 1)  # and afterwards a graph can be captured
""")


def test_a_graph_computes_when_it_is_replayed_from_what_is_there_then(
    run: Callable[[str], None],
) -> None:
    run("""
count = torch.zeros(1, dtype=torch.int64, device="cuda")
factor = 2
def step():
    global count
    count += 1
    return (x * factor).sum(0)
graph, result = captured(step)
assert count.tolist() == [0] and bool(result.isnan().all())
for turn in (1, 2, 3):
    x.fill_(turn)
    factor = 100  # was read when the graph was captured
    graph.replay()
    assert count.tolist() == [turn] and result.tolist() == [4.0 * turn] * 3
""")


def test_a_graph_must_not_outlive_its_inputs(run: Callable[[str], None]) -> None:
    run("""
graph, result = captured(lambda: x + 1)
graph.replay()
x = x.clone()  # the graph reads where x was
assert "memory that was freed" in message(graph.replay)
""")


def test_graphs_that_share_memory_overwrite_what_nobody_holds(run: Callable[[str], None]) -> None:
    run("""
pool = torch.cuda.graph_pool_handle()
def make(add):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        middle = x + add
        return graph, middle, middle * 2
first, middle, end = make(1)
second, _, other = make(5)
first.replay()
second.replay()
assert end[0].tolist() == [2.0, 4.0, 6.0] and middle[0].tolist() == [1.0, 2.0, 3.0]
del middle
first.replay()
raw = first.capture.launches[0].outputs[0]
assert raw[0].tolist() == [1.0, 2.0, 3.0]
second.replay()
assert bool(raw.isnan().all()) and end[0].tolist() == [2.0, 4.0, 6.0]
""")


@pytest.mark.parametrize("mode", ["global", "thread_local"])
def test_other_threads_disturb_a_capture_that_is_not_of_its_thread_alone(
    run: Callable[[str], None], mode: str
) -> None:
    run(f"""
import threading
heard = []
def capture():
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode={mode!r}):
        thread = threading.Thread(target=lambda: heard.append(message(x.cpu)))
        thread.start()
        thread.join()
        return x + 1
ended = message(capture)
wrong = {mode!r} == "global"
assert ("not permitted" in heard[0], "previous error" in ended) == (wrong, wrong), (heard, ended)
""")


@pytest.mark.slow
@pytest.mark.parametrize(
    "selection",
    [
        "not models and not engines",
        "models and cuda and (llama or gpt_oss or bloom or diffllama or qwen3_next)",
        "engines and cuda",
    ],
)
def test_the_tests_for_gpus_pass_on_it(guard: Path, selection: str) -> None:
    """Operators and models as a GPU would run them; all of it: see docs/adding-a-backend.md."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", str(TESTS / "test_gpu.py")]
    environment = {**os.environ, "PYKVCACHE_SIMULATED_GPU": str(guard), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [*command, "-k", selection], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "passed" in done.stdout
