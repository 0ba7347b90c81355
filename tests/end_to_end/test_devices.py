"""A module that was captured on one device and runs on another."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import bone_fx
from bone_fx.train.mounting import with_parameters
from tests.capture.architectures import BY_NAME
from tests.elsewhere import call_on_cuda
from tests.end_to_end.test_adapted import CONFIG, inputs, llama, stir

pytestmark = pytest.mark.usefixtures("captures_once")


def runs_on_cuda(module: Any) -> bool:
    return {tensor.device.type for tensor in call_on_cuda(module, inputs())} == {"cuda"}


def test_every_form_runs_where_its_inputs_are() -> None:
    adapted = bone_fx.adapt(llama(), CONFIG, inputs()).train()
    stir(adapted, "default")
    assert runs_on_cuda(adapted)
    assert runs_on_cuda(adapted.fold())
    with adapted.disable_adapter():
        assert runs_on_cuda(adapted)
    adapted.layer_modules()
    assert runs_on_cuda(adapted)
    assert runs_on_cuda(copy.deepcopy(adapted).eval())


def test_grouped_heads_run_where_their_inputs_are() -> None:
    row = BY_NAME["qwen2"]
    given = row.inputs(2, 7)
    adapted = bone_fx.adapt(row.build(), CONFIG, given)
    assert "enable_gqa = True" in adapted.code
    assert all(tensor.device.type == "cuda" for tensor in call_on_cuda(adapted, given))


class Regions(nn.Module):
    """Makes tensors where its input is, inside regions that a trace keeps as operators."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, scale: Tensor, x: Tensor) -> Tensor:
        y = self.linear(x) * scale
        with torch.no_grad():
            steps = torch.arange(8, device=x.device).float() * x.mean()
        with torch.autocast(x.device.type, enabled=False):
            return y + torch.arange(8, device=x.device) + steps @ x.mT


def test_regions_and_a_number_on_the_cpu() -> None:
    config = bone_fx.BoneConfig(r=4, target_modules=["linear"])
    adapted = bone_fx.adapt(Regions(), config, (torch.tensor(2.0), torch.randn(8, 8)))
    assert "getattr_1 = scale.device" not in adapted.code
    assert "wrap_with_autocast('cpu'" not in adapted.code
    given = {"scale": torch.tensor(2.0), "x": torch.randn(8, 8)}
    assert {tensor.device.type for tensor in call_on_cuda(adapted, given)} == {"cuda"}


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.linear(x), lengths.cpu(), batch_first=True)
        return packed.data + torch.zeros(1, device=x.device)


def test_what_an_operator_wants_on_the_cpu_stays_there() -> None:
    config = bone_fx.BoneConfig(r=4, target_modules=["linear"])
    example = (torch.randn(2, 3, 8), torch.tensor([3, 2]))
    adapted = bone_fx.adapt(Packed(), config, example)
    (moved,) = [line for line in adapted.code.splitlines() if "(lengths, " in line]
    assert "device(type='cpu')" in moved
    assert "device = getattr_1" in adapted.code


def test_a_model_takes_what_moved_and_keeps_its_ties() -> None:
    model = nn.Module()
    model.first, model.second = nn.Linear(4, 4), nn.Linear(4, 4)
    model.second.weight = model.first.weight
    model.first.register_buffer("table", torch.ones(3, dtype=torch.float64))
    model.second.register_buffer("table", model.first.table)
    moved = with_parameters(model, copy.deepcopy(model).to("meta"), {"second.bias"})
    assert {t.device.type for t in (*moved.parameters(), *moved.buffers())} == {"meta"}
    assert moved.first.weight is moved.second.weight
    assert moved.first.table is moved.second.table
    assert moved.first.table.dtype == torch.float64
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"cpu"}
