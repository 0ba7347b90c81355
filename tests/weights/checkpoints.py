"""Checkpoints on disk for tests, and what transformers itself makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from bone_fx.base.loading import open_base, skeleton
from bone_fx.weights.load_plan import recipes_for
from tests.capture.architectures import Architecture


def save(row: Architecture, folder: Path, *, shard: str = "5GB", **overrides: object) -> None:
    """Save a tiny model whose weights are all different, norms and biases included."""
    model = row.build(**overrides)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder, max_shard_size=shard)


def edit_json(path: Path, **fields: object) -> None:
    """Set fields of a JSON object in a file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, the ones that are not saved included, tied names too."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def agree(
    folder: Path, dtype: torch.dtype = torch.float32, model_class: str | None = None
) -> nn.Module:
    """Skeleton and recipes of a folder against `from_pretrained`, bit for bit; gives back the
    skeleton."""
    base = open_base(folder)
    architecture = None if model_class is None else getattr(transformers, model_class)
    model, plan = skeleton(base, dtype, architecture=architecture)
    recipes = recipes_for(model, plan, base.tensors)
    expected = all_tensors((architecture or base.architecture).from_pretrained(folder, dtype=dtype))
    shells = all_tensors(model)
    assert sorted(recipes) == sorted(expected) == sorted(shells)
    for name, tensor in expected.items():
        value = recipes[name].evaluate()
        assert value.is_contiguous()
        assert (
            (value.dtype, value.shape)
            == (tensor.dtype, tensor.shape)
            == (recipes[name].dtype, recipes[name].shape)
        )
        assert (shells[name].dtype, shells[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(value, tensor), f"{name}: {recipes[name].describe()}"
    assert all(isinstance(p, FakeTensor) for p in model.parameters())
    assert len({id(p.fake_mode) for p in model.parameters() if isinstance(p, FakeTensor)}) == 1
    for name in plan.sources:
        assert isinstance(shells[name], FakeTensor), name
    return model
