"""Attention of encoders: which operators it becomes, and that padding is still padding."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from bone_fx.capture.forward import capture_forward
from bone_fx.deploy.builds.forward_model import forward_model
from bone_fx.onnx.writer import write_model
from tests.capture.test_forward import _IMAGE, _TEXT, inputs_for
from tests.onnx.models import ops, run
from tests.tiers import slow
from tests.tolerances import assert_agrees

_FUSED = {"MultiHeadAttention", "Attention"}
_SMALL: dict[str, Any] = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
# class, fields of its config; test_forward.py has others
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", _TEXT),
    "electra": ("Electra", {**_TEXT, "embedding_size": 16}),
    "distilbert": ("DistilBert", {**_SMALL, "vocab_size": 50, "max_position_embeddings": 40}),
    "modernbert": ("ModernBert", {**_TEXT, "pad_token_id": 0, "local_attention": 4}),
    "dinov2": ("Dinov2", _IMAGE),
}


def build(name: str) -> transformers.PreTrainedModel:
    kind, fields = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**fields)
    real = getattr(transformers, f"{kind}Model")(config).eval()
    with torch.no_grad():
        for parameter in real.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return real


@pytest.mark.parametrize("name", ["modernbert", *slow("electra", "distilbert", "dinov2")])
def test_attention_is_one_operator(name: str, tmp_path: Path) -> None:
    real = build(name)
    capture = capture_forward(real)
    model = forward_model(capture)
    counts = Counter(ops(model))
    assert sum(counts[kind] for kind in _FUSED) == real.config.num_hidden_layers
    assert counts["Softmax"] == 0
    write_model(model, tmp_path)
    for batch, length in ((3, 11), (1, 1), (2, 23)):
        inputs = inputs_for(capture.input_names, batch, length)
        with torch.no_grad():
            expected = real(**inputs)
        for field, found in zip(capture.output_names, run(tmp_path, inputs), strict=True):
            assert_agrees(found, expected[field], "logits")


def test_padding_alone_gives_finite_values_and_leaves_the_others_be(tmp_path: Path) -> None:
    real = build("bert")
    capture = capture_forward(real)
    write_model(forward_model(capture), tmp_path)
    inputs = inputs_for(capture.input_names, 3, 9)
    inputs["attention_mask"][1] = 0
    with torch.no_grad():
        expected = real(**inputs).last_hidden_state
    found, *_ = run(tmp_path, inputs)
    assert torch.isfinite(found).all()
    assert_agrees(found[::2], expected[::2], "logits")


class Padded(torch.nn.Module):
    """A mask that is computed: a row may be all padding, which is 0 in torch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = x.view(x.shape[0], x.shape[1], 2, 8).transpose(1, 2)
        mask = (x[:, :, 0] > 0)[:, None, None, :]
        y = torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)
        return y.transpose(1, 2).flatten(2)


def test_a_computed_mask_keeps_rows_of_nothing_at_zero(tmp_path: Path) -> None:
    x = torch.randn(3, 7, 16)
    model = forward_model(capture_forward(Padded(), (x,)))
    assert Counter(ops(model))["MultiHeadAttention"] == 1
    write_model(model, tmp_path)
    x[1, :, 0] = -1
    (found,) = run(tmp_path, {"x": x})
    assert_agrees(found, Padded()(x), "output")
    assert not found[1].any()


@pytest.mark.parametrize("other", ["causal", "windowed", "of ones"])
def test_a_mask_that_is_more_than_padding_stays(other: str, tmp_path: Path) -> None:
    class Attention(torch.nn.Module):
        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            q = x.view(x.shape[0], x.shape[1], 2, 8).transpose(1, 2)
            place = torch.arange(x.shape[1])
            distance = place[:, None] - place[None, :]
            allowed = (mask == 1) if other == "of ones" else (mask != 0)
            allowed = allowed[:, None, None, :].expand(-1, 1, x.shape[1], -1)
            if other == "causal":
                allowed = allowed & (distance >= 0)
            if other == "windowed":
                allowed = allowed & (distance.abs() <= 2)
            y = torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=allowed)
            return y.transpose(1, 2).flatten(2)

    x, mask = torch.randn(4, 9, 16), torch.randint(0, 3, (4, 9))
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    shapes = {"x": {0: batch, 1: length}, "mask": {0: batch, 1: length}}
    program = torch.export.export(Attention(), (x, mask), dynamic_shapes=shapes)
    write_model(forward_model(capture_forward(program)), tmp_path)
    (found,) = run(tmp_path, {"x": x, "mask": mask})
    assert_agrees(found, Attention()(x, mask), "output")
