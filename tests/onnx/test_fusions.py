"""Passes that make one operator of several: what they join, and what they leave."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from bone_fx.capture.forward import capture_forward
from bone_fx.deploy.builds.forward_model import forward_model
from bone_fx.onnx.cleanup.fuse_bias_gelu import FuseBiasGelu
from bone_fx.onnx.cleanup.fuse_skip_norms import FuseSkipNorms
from tests.onnx.models import ops, write_and_run
from tests.tolerances import assert_agrees


class Residual(nn.Module):
    def __init__(self, bias: bool, pre_norm: bool, approximate: str = "none") -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 50, bias=bias), nn.Linear(50, 16, bias=bias)
        self.norm, self.last = nn.LayerNorm(16, eps=1e-3), nn.LayerNorm(16, bias=False)
        self.pre_norm, self.act = pre_norm, nn.GELU(approximate)

    def forward(self, x: Tensor) -> Tensor:
        total = x + self.down(self.act(self.up(x)))
        y = self.norm(total)
        return self.last(y + (total if self.pre_norm else x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("pre_norm", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_residuals(bias: bool, pre_norm: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = Residual(bias, pre_norm).eval(), torch.randn(3, 7, 16)
    expected = net(x)
    capture = capture_forward(net.to(dtype), (x.to(dtype),))
    model = forward_model(capture, skip_norms=True)
    counts = Counter(ops(model))
    assert counts["SkipLayerNormalization"] == 2
    assert counts["BiasGelu" if bias else "Gelu"] == 1
    assert (counts["Add"], counts["LayerNormalization"], counts["MatMul"]) == (0, 0, 2)
    for step in (FuseSkipNorms(), FuseBiasGelu()):
        assert not step(model).modified
    (found,) = write_and_run(model, tmp_path, {"x": x.to(dtype)})
    assert_agrees(found, expected, "output", dtype)


def test_residuals_stay_unless_asked_for() -> None:
    model = forward_model(capture_forward(Residual(True, True).eval(), (torch.randn(3, 7, 16),)))
    assert Counter(ops(model))["SkipLayerNormalization"] == 0


def test_the_tanh_form_of_gelu(tmp_path: Path) -> None:
    net, x = Residual(True, False, "tanh").eval(), torch.randn(3, 7, 16)
    model = forward_model(capture_forward(net, (x,)))
    (node,) = [node for node in model.graph if node.op_type == "FastGelu"]
    assert len(node.inputs) == 2
    (found,) = write_and_run(model, tmp_path, {"x": x})
    assert_agrees(found, net(x), "output")


class Broadcast(nn.Module):
    """Sums that the operators cannot take: a row for all, and four dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.row, self.norm = nn.Parameter(torch.randn(7, 16)), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        four = x.view(x.shape[0], 7, 1, 16)
        return self.norm(x + self.row) + self.norm(four + four.tanh())[:, :, 0]


def test_what_broadcasts_or_has_more_dimensions_stays(tmp_path: Path) -> None:
    net, x = Broadcast().eval(), torch.randn(3, 7, 16)
    model = forward_model(capture_forward(net, (x,)), skip_norms=True)
    assert Counter(ops(model))["LayerNormalization"] == 2
    (found,) = write_and_run(model, tmp_path, {"x": x})
    assert_agrees(found, net(x), "output")


def test_a_sum_that_is_an_output_keeps_its_name() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(16)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            total = x + x.tanh()
            return {"total": total, "normed": self.norm(total)}

    capture = capture_forward(Both(), (torch.randn(3, 7, 16),))
    model: ir.Model = forward_model(capture, skip_norms=True)
    assert [value.name for value in model.graph.outputs] == ["total", "normed"]
    assert "LayerNormalization" in ops(model)
