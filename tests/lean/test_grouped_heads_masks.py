"""Attention under a mask becomes the operator that looks at it; other attention stays."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

import bone_fx
from bone_fx.graphs import copy_graph
from bone_fx.lean.grouped_heads import look_at_masks
from tests.capture.architectures import BY_NAME
from tests.framed import modifies
from tests.tolerances import assert_agrees

pytestmark = pytest.mark.usefixtures("captures_once")

SDPA = torch.ops.aten.scaled_dot_product_attention.default


class Attention(nn.Module):
    def __init__(self, masked: bool = True, **options: Any) -> None:
        super().__init__()
        self.masked, self.options = masked, options

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        given = mask if self.masked else None
        return functional.scaled_dot_product_attention(q, k, v, given, **self.options)


def tensors() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 5, 8, generator=generator) for _ in "qkv")
    return q, k, v, torch.ones(5, 5, dtype=torch.bool).tril()


def trace(module: nn.Module) -> fx.GraphModule:
    traced = torch.export.export(module, tensors(), strict=False).module(check_guards=False)
    graph: Any = traced.graph
    graph.set_codegen(torch.fx.graph.CodeGen())
    return fx.GraphModule(traced, graph)


def test_attention_under_a_mask() -> None:
    gm = trace(Attention(dropout_p=0.0, scale=0.3))
    looking = copy_graph(gm.graph)
    assert modifies(look_at_masks, looking)
    assert not looking.find_nodes(op="call_function", target=SDPA)
    assert not modifies(look_at_masks, looking)  # a second time there is nothing to do
    (found,), (expected,) = (fx.GraphModule(gm, g)(*tensors()) for g in (looking, gm.graph))
    assert torch.equal(found, expected)


def test_attention_without_a_mask_stays() -> None:
    for is_causal in (False, True):
        graph = copy_graph(trace(Attention(masked=False, is_causal=is_causal)).graph)
        before = str(graph)
        assert not modifies(look_at_masks, graph)
        assert str(graph) == before


def test_a_decoder_needs_a_mask_for_padding_only(monkeypatch: pytest.MonkeyPatch) -> None:
    row = BY_NAME["llama"]
    batch = row.inputs(3, 12)
    config = bone_fx.BoneConfig(r=4, target_modules=["q_proj"])
    adapted = bone_fx.adapt(row.build(), config, batch)
    seen: set[tuple[bool, bool]] = set()
    plain = functional.scaled_dot_product_attention

    def noted(*args: Any, **options: Any) -> Tensor:
        _, _, _, mask, _, is_causal = args
        seen.add((mask is None, is_causal))
        return plain(*args, **options)

    model = row.build()
    for without_mask in (True, False):
        mask = torch.ones_like(batch["input_ids"])
        if not without_mask:
            mask[0, -3:] = 0
        given = {**batch, "attention_mask": mask}
        expected = model(**given).logits
        with monkeypatch.context() as patched:
            patched.setattr(functional, "scaled_dot_product_attention", noted)
            found = adapted(**given).logits
        assert seen == {(without_mask, without_mask)}
        assert_agrees(found[mask.bool()], expected[mask.bool()], "logits")
        seen.clear()


def test_each_call_looks_at_its_masks_anew() -> None:
    """A mask of NumPy's memory changes without a new version."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(8, 8)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            y = self.proj(x)[:, None]
            return functional.scaled_dot_product_attention(y, y, y, mask)

    torch.manual_seed(0)
    memory = numpy.ones((2, 1, 5, 5), dtype=bool)
    model, batch = Own(), {"x": torch.randn(2, 5, 8), "mask": torch.from_numpy(memory)}
    adapted = bone_fx.adapt(model, bone_fx.BoneConfig(r=4, target_modules=["proj"]), batch)
    assert "bone_fx.attention" in adapted.code
    for hidden in (0, 2, 3):
        memory[..., 5 - hidden :] = False
        assert_agrees(adapted(**batch), model(**batch), "output")
