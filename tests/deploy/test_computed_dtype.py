"""The dtype that sets the tolerance of a module: what is computed in, not what is stored."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bone_fx
from bone_fx.capture.forward import capture_forward
from bone_fx.deploy.builds.forward_model import forward_model
from bone_fx.deploy.builds.module import computed_dtype


class Mixed(nn.Module):
    """A layer in float32, a table and a layer in float16, and a way to use them."""

    def __init__(self, call: Callable[[Mixed, Tensor], Tensor]) -> None:
        super().__init__()
        self.lin = nn.Linear(24, 24)
        self.narrow = nn.Linear(24, 24).half()
        self.register_buffer("table", torch.randn(9, 24).half())
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, self.lin(x))


CALLS: dict[str, tuple[str, Callable[[Mixed, Tensor], Tensor]]] = {
    "not used": ("fp32", lambda m, y: y),
    "promoted": ("fp32", lambda m, y: y * m.table[0]),
    "looked up": ("fp32", lambda m, y: y + m.table[: y.shape[0]].float()),
    "computed in": ("fp16", lambda m, y: y + (m.table[0] * m.table[1]).float()),
    "a layer": ("fp16", lambda m, y: m.narrow(y.half()).float()),
    "rounded to": ("fp16", lambda m, y: y.half().float()),
    "to double": ("fp32", lambda m, y: y.double() * m.table[0]),
}


@pytest.mark.parametrize("how", CALLS)
def test_computed_dtype(how: str) -> None:
    expected, call = CALLS[how]
    capture = capture_forward(Mixed(call).eval(), (torch.randn(3, 24),))
    assert computed_dtype(forward_model(capture, skip_norms=False)) == expected


@pytest.mark.parametrize(("dtype", "name"), [(torch.float16, "fp16"), (torch.float64, "fp64")])
def test_a_module_of_one_dtype(dtype: torch.dtype, name: str) -> None:
    net = nn.Sequential(nn.Embedding(7, 12), nn.Linear(12, 12), nn.LayerNorm(12)).to(dtype).eval()
    capture = capture_forward(net, (torch.tensor([[1, 2, 6]]),))
    assert computed_dtype(forward_model(capture, skip_norms=False)) == name


def test_a_stored_half_leaves_the_tolerance_of_the_export(tmp_path: Path) -> None:
    module = Mixed(CALLS["looked up"][1]).eval()
    bone_fx.export(module, output=tmp_path / "out", example_inputs=(torch.randn(3, 24),))
    manifest = json.loads((tmp_path / "out" / "bone_export.json").read_text())
    assert manifest["verification"]["tolerance"] <= 1e-4
