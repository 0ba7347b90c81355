"""What holds for every test: no hub, one thread a process, the same seed."""

from __future__ import annotations

import os

# Read by the libraries while they are imported, so they come first.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings

# A test that fails does so for everyone, and a busy machine is no failure.
settings.register_profile("bone_fx", deadline=None, derandomize=True, database=None)
settings.load_profile("bone_fx")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The long ones first, or the last of them would run while the other processes wait.
    items.sort(key=lambda item: item.path.parent.name != "end_to_end")
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))
