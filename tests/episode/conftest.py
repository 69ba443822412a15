"""Episodes are played in this process, unless a test says otherwise."""

import pytest


@pytest.fixture(autouse=True)
def without_processes(local_pool):
    pass
