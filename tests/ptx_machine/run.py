"""Run tests of a GPU backend on the PTX that a GPU would run.

    python tests/ptx_machine/run.py [--backend triton|cuda] [--arch sm_80|sm_90|sm_90a]
                                    [--all] [-k EXPRESSION] [--seed N]

Without --all this is tests/test_ptx_triton.py or test_ptx_cuda.py. With it, it is every case of the
operators' own tests: test_paged_attention.py and test_cache_ops.py. Exits with 1 if one fails.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # read when triton is imported
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what it is when unset, without a warning
TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import pytest  # noqa: E402
from rich.progress import (  # noqa: E402
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

ALL = ("test_paged_attention.py", "test_cache_ops.py")


class Played:
    """Plugin of pytest: the backend is ready, on the machine, for the whole session."""

    def __init__(self, backend: str, arch: str, seed: int | None) -> None:
        self.backend, self.arch, self.seed = backend, arch, seed
        self.context: Any = None

    def pytest_sessionstart(self) -> None:
        from pykvcache import operators

        operators.LOADERS["cuda"] = lambda: "not on this machine"
        driver = importlib.import_module(f"ptx_machine.{self.backend}_driver")
        driver.load()
        self.context = driver.playing(self.arch, seed=self.seed)
        self.context.__enter__()

    def pytest_sessionfinish(self) -> None:
        if self.context is not None:
            self.context.__exit__(None, None, None)


class Bar:
    """Plugin of pytest: a progress bar instead of dots."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self.progress = Progress(*columns, TimeRemainingColumn())
        self.failed = 0

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.task = self.progress.add_task("cases", total=len(session.items))
        self.progress.start()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed += 1
            self.progress.console.print(f"failed: {report.nodeid}", markup=False)
        if report.when == "teardown":
            self.progress.update(self.task, advance=1, description=f"{self.failed} failed")

    def pytest_sessionfinish(self) -> None:
        self.progress.stop()


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", choices=("triton", "cuda"), default="triton")
    parser.add_argument("--arch", choices=("sm_80", "sm_90", "sm_90a"), default="sm_80")
    parser.add_argument("--all", action="store_true", help="the whole case table, many minutes")
    parser.add_argument("--seed", type=int, help="run the CTAs in an order drawn with this seed")
    parser.add_argument("-k", default="", help="cases whose name matches, as in pytest")
    options = parser.parse_args(arguments)
    words = ["-q", "-p", "no:cacheprovider", "--no-header", "--tb=short", "--import-mode=importlib"]
    words += ["--rootdir", str(TESTS.parent), "--timeout", "600"]
    if options.all:
        chosen = options.backend + (f" and ({options.k})" if options.k else "")
        words += ["-k", chosen, *(str(TESTS / name) for name in ALL)]
        plugins = [Played(options.backend, options.arch, options.seed), Bar()]
    else:
        os.environ["PYKVCACHE_PTX_ARCH"] = options.arch
        words += ["-k", options.k, str(TESTS / f"test_ptx_{options.backend}.py")]
        plugins = [Bar()]
    return int(pytest.main(words, plugins=plugins))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
