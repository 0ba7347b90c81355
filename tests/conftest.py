"""What holds for every test: no hub, one thread a process, the same seed."""

from __future__ import annotations

import os

# Read by the libraries while they are imported, so they come first.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import torch._dynamo
from hypothesis import settings

# A test that fails does so for everyone, and a busy machine is no failure.
settings.register_profile("bone_fx", deadline=None, derandomize=True, database=None)
settings.load_profile("bone_fx")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def captures_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """`adapt` captures equal transformers models once a process, each over weights of its own.

    For tests of what comes after the capture.
    """
    import bone_fx.train.origin as capturing
    from tests.captures import capture_once

    monkeypatch.setattr(capturing, "capture_training", capture_once)


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    # PyTorch 2.13's cache of shapes checks every entry by making it anew: among symbolic sizes it
    # pays from about ten layers on, and doubles the time of a trace of two. The graphs are equal.
    # Processes that tests start have it, as users do.
    torch._dynamo.config.fake_tensor_cache_enabled = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The long ones first, or the last of them would run while the other processes wait.
    items.sort(key=lambda item: item.path.parent.name != "end_to_end")
    if torch.cuda.is_available():
        return
    for item in items:
        marker = item.get_closest_marker("gpu")
        if marker is not None and not marker.kwargs.get("or_cpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))
