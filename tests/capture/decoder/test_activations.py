"""A GELU that is written out is recognised; what only looks like one is not."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from bone_fx.capture.decoder.activations import gelus_as_operators, is_candidate, recognise_gelu


class Quick(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Slightly(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        inner = math.sqrt(2 / math.pi) * (x + 0.0447 * x**3)
        return 0.5 * x * (1 + torch.tanh(inner))


class Refusing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("not now")


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean()


@pytest.mark.parametrize(
    ("name", "approximate"),
    [
        ("gelu_new", "tanh"),
        ("gelu_fast", "tanh"),
        ("gelu_pytorch_tanh", "tanh"),
        ("gelu_python", "none"),
        ("gelu", "none"),
        ("quick_gelu", None),
        ("silu", None),
        ("relu2", None),
        ("gelu_10", None),
    ],
)
def test_transformers_activations(name: str, approximate: str | None) -> None:
    assert recognise_gelu(ACT2FN[name]) == approximate


@pytest.mark.parametrize("kind", [Quick, Slightly, Refusing, Mean])
def test_others_stay(kind: type[nn.Module]) -> None:
    module = kind()
    assert is_candidate(module)
    assert recognise_gelu(module) is None


def test_the_model_is_as_it_was() -> None:
    model = nn.Sequential(ACT2FN["gelu_new"], Quick(), nn.GELU(), nn.Linear(2, 2))
    with gelus_as_operators(model):
        assert "forward" in vars(model[0])
        x = torch.randn(7)
        torch.testing.assert_close(model[0](x), nn.functional.gelu(x, approximate="tanh"))
        assert [name for name, m in model.named_children() if "forward" in vars(m)] == ["0"]
    assert all("forward" not in vars(module) for module in model)
