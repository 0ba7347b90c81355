"""Quantized experts: each as it would be alone, one in memory at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from bone_fx.base.loading import open_base, skeleton
from bone_fx.onnx.recipe_tensor import set_recipe
from bone_fx.onnx.writer import write_model
from bone_fx.weights.load_plan import recipes_for
from bone_fx.weights.recipes.experts import QuantizedExperts
from bone_fx.weights.recipes.nbits import Scheme, pack, quantize
from bone_fx.weights.recipes.quantized import rows_in_float32
from bone_fx.weights.recipes.recipe import Cast, Recipe, Transpose, Value
from bone_fx.weights.recipes.reorder import Regrouped
from bone_fx.weights.storage.boxes import Box, whole, within
from tests.capture.architectures import BY_NAME
from tests.weights.checkpoints import save

X, N, K = 5, 24, 96


def weights() -> Tensor:
    return torch.randn(X, N, K, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True, eq=False)
class Asked(Recipe):
    """A stack that notes which of its parts are asked for."""

    tensor: Tensor
    by_expert: bool
    boxes: list[Box] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def fill(self, out: Tensor, at: Box) -> None:
        self.boxes.append(at)
        out.copy_(self.tensor[within(at, whole(self.shape))])

    def cuts(self, dim: int) -> bool:
        return self.by_expert

    def describe(self) -> str:
        return "a stack"


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_parts_are_those_of_each_expert(bits: int, symmetric: bool) -> None:
    scheme = Scheme(bits, 32, symmetric, torch.float16)
    experts = QuantizedExperts(Value(weights()), scheme)
    alone = [quantize(w, scheme) for w in weights()]
    expected = {
        "codes": torch.stack([pack(g.codes, bits).flatten(1) for g in alone]),
        "scales": torch.stack([g.scales for g in alone]),
        "zero_points": torch.stack([pack(g.zeros, bits) for g in alone]),
    }
    if symmetric:
        del expected["zero_points"]
    for name, content in reversed(expected.items()):
        part = experts.part(name)  # type: ignore[arg-type]  # a name of a part
        assert (part.shape, part.dtype) == (tuple(content.shape), content.dtype)
        assert torch.equal(part.evaluate(), content)
        assert torch.equal(part.part(((3, 5), (0, N), (0, part.shape[2]))), content[3:])


@pytest.mark.parametrize("by_expert", [True, False])
def test_writing_asks_for_each_expert_once(by_expert: bool, tmp_path: Path) -> None:
    stack = Asked(weights(), by_expert)
    experts = QuantizedExperts(stack, Scheme(4, 32))
    names: Any = ("codes", "scales", "zero_points")
    values = [ir.Value(name=name) for name in names]
    for name, value in zip(names, values, strict=True):
        set_recipe(value, experts.part(name))
    graph = ir.Graph([], values, nodes=[], initializers=values, opset_imports={"": 18}, name="g")
    hashes = [write_model(ir.Model(graph, ir_version=10), tmp_path).files[-1].sha256]
    first = [(i, i + 1) for i in range(X)] if by_expert else [(0, X)]
    assert sorted(at[0] for at in stack.boxes) == first
    assert not experts._waiting
    hashes.append(write_model(ir.Model(graph, ir_version=10), tmp_path).files[-1].sha256)
    assert hashes[0] == hashes[1]


def test_experts_are_not_rounded_before_they_are_quantized() -> None:
    stack = Value(weights())
    half = Cast(Transpose(stack, (0, 2, 1)), torch.float16)
    found = rows_in_float32(Regrouped(half, 1, 2, 3), transposed=False)
    assert torch.equal(found.evaluate(), Regrouped(half.recipe, 1, 2, 3).evaluate())


@pytest.mark.parametrize("part", ["gate_up_proj", "down_proj"])
def test_experts_of_a_checkpoint_are_read_one_by_one(part: str, tmp_path: Path) -> None:
    save(BY_NAME["mixtral"], tmp_path)
    base = open_base(tmp_path)
    model, plan = skeleton(base, torch.float16)
    name = f"model.layers.0.mlp.experts.{part}"
    recipe = recipes_for(model, plan, base.tensors)[name]
    source = plan.sources[name]
    assert recipe.cuts(0)
    assert source.convert is not None
    assert len(source.slices) == recipe.shape[0] == 4
    together = source.convert([base.tensors[key].evaluate() for key in source.keys])
    assert torch.equal(recipe.evaluate(), together.half())
    rows = whole(recipe.shape)[1:]
    assert torch.equal(recipe.part(((2, 3), *rows))[0], together[2].half())
