"""A launch table that a test puts in force is gone after it."""

from __future__ import annotations

import pytest

from pykvcache import launch_table


@pytest.fixture(autouse=True)
def _restore_launches():
    yield
    launch_table.use_on_cpu({})
