"""Adapters on every architecture: the model itself before the blocks move, gradients, names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama
from transformers.pytorch_utils import Conv1D

import bone_fx
import bone_fx.train.origin as capturing
from tests.capture.architectures import ARCHITECTURES, CORE, UNLISTED, Architecture, text
from tests.capture.training.captured import captured
from tests.elsewhere import call_on_cuda
from tests.tiers import tiered
from tests.tolerances import difference, scaled_difference


class RenamedAttention(modeling_llama.LlamaAttention):
    """A class that no table knows."""


class RenamedForCausalLM(LlamaForCausalLM):
    """A Llama under another name, with another attention class."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        for i, layer in enumerate(self.model.layers):
            layer.self_attn = RenamedAttention(config, i)


R = 16
CONFIG = bone_fx.BoneConfig(r=R, target_modules="all-linear")


def of_block(layer: nn.Module, gradient: Tensor) -> Tensor:
    """dD from dW: Bone adds block row i mod R to column i of the weight."""
    dw_IO = gradient if isinstance(layer, Conv1D) else gradient.t()
    rows = torch.arange(len(dw_IO)) % R
    return dw_IO.new_zeros(R, dw_IO.shape[1]).index_add_(0, rows, dw_IO)


def check(model: Any, adapted: bone_fx.AdaptedModule, inputs: dict[str, Tensor]) -> None:
    adapted.train()
    names = list(adapted.state_dict())
    assert [name for name in names if "bone_block" not in name] == list(model.state_dict())
    torch.manual_seed(7)
    ours = adapted(**inputs)
    model.train()
    torch.manual_seed(7)
    theirs = model(**inputs)
    for key, value in ours.items():
        if isinstance(value, Tensor):
            assert difference(value, theirs[key]) <= 1e-6, key
    if "input_values" not in inputs:  # without values there are no convolutions over audio
        assert {tensor.device.type for tensor in call_on_cuda(adapted, inputs)} == {"cuda"}

    def gradients(output: Any, parameters: dict[str, Tensor]) -> dict[str, Tensor | None]:
        first = next(t for t in pytree.tree_leaves(output) if t.is_floating_point())
        weights = torch.linspace(-1, 1, first.numel()).view_as(first)
        found = torch.autograd.grad(
            (first * weights).sum(), list(parameters.values()), allow_unused=True
        )
        return dict(zip(parameters, found, strict=True))

    blocks = {
        n.removesuffix(".bone_block.default"): p
        for n, p in adapted.named_parameters()
        if p.requires_grad
    }
    bases = {site: model.get_parameter(f"{site}.weight") for site in blocks}
    of_blocks, of_bases = gradients(ours, blocks), gradients(theirs, bases)
    assert len(blocks) >= 6
    reached = [
        site for site, gradient in of_bases.items() if gradient is not None and bool(gradient.any())
    ]
    assert len(reached) >= 6
    for site in reached:
        gradient, of_base = of_blocks[site], of_bases[site]
        assert gradient is not None, site
        assert of_base is not None, site
        expected = of_block(model.get_submodule(site), of_base)
        assert bool(expected.any()), site
        assert scaled_difference(gradient, expected) <= 1e-5, site


@pytest.mark.parametrize("row", tiered(ARCHITECTURES + UNLISTED, CORE), scope="session")
def test_every_architecture_takes_adapters(
    row: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, capture = captured(row.name)
    monkeypatch.setattr(capturing, "capture_training", lambda *_args, **_options: capture)
    check(model, bone_fx.adapt(model, CONFIG, row.inputs(3, 12)), row.inputs(2, 7))


def test_a_subclass_with_renamed_classes() -> None:
    row = next(row for row in ARCHITECTURES if row.name == "llama")
    torch.manual_seed(0)
    model = RenamedForCausalLM(LlamaConfig(**row.config)).eval()
    check(model, bone_fx.adapt(model, CONFIG, text(3, 12)), text(2, 7))
