"""Equal layers are traced once, and the graph is the one of a trace of every layer."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from bone_fx.capture.decoder.capture_decoder import DecoderCapture, capture_decoder
from bone_fx.capture.stamping.keys import layer_key, numbers_of
from bone_fx.capture.stamping.layer_number import LayerNumber
from tests.capture.architectures import BY_NAME
from tests.capture.decoder.decoders import CORE, DECODERS, Decoder
from tests.capture.decoder.decoding import captured, skeleton_of
from tests.tiers import slow, tiered

ROW = {row.name: row for row in DECODERS}


def content(capture: DecoderCapture) -> list[Any]:
    """The graph: targets, arguments by position of the node, shapes, names of the constants."""
    names = {
        spec.arg.name: spec.target or "input"
        for spec in capture.program.graph_signature.input_specs
    }
    place = {node: i for i, node in enumerate(capture.program.graph.nodes)}
    user = [n for n in place if n.op == "placeholder" and names[n.name] == "input"]
    pasts = set(user[2:])  # all of one batch size and length: any may be asked for them

    def plain(value: Any) -> Any:
        return torch.fx.node.map_arg(value, lambda n: f"%{place[n]}")

    def arguments(node: torch.fx.Node) -> Any:
        if node.target == torch.ops.aten.sym_size.int and node.args[0] in pasts:
            return ("a past", node.args[1])
        return plain(node.args)

    return [
        (
            node.op,
            names.get(node.name) if node.op == "placeholder" else str(node.target),
            str(arguments(node)),
            str(plain(node.kwargs)),
            str(getattr(node.meta.get("val"), "dtype", None)),
        )
        for node in capture.program.graph.nodes
    ]


# What the graphs of all rows compute is compared with their models elsewhere. In every run: equal
# layers, layers of two kinds, ALiBi, and attention that the model computes by itself.
KINDS = ("llama", "gemma3_text", "falcon_new", "gpt_neo")


@pytest.mark.parametrize("row", tiered([ROW[name] for name in CORE], KINDS), scope="session")
def test_the_graph_is_that_of_a_full_trace(row: Decoder) -> None:
    model, once = captured(row.name)
    whole = capture_decoder(skeleton_of(model), stamp=False)
    assert content(once) == content(whole)
    assert once.layers == whole.layers
    assert (once.notes, once.norms, once.derived) == (whole.notes, whole.norms, whole.derived)
    assert once.constants.keys() == whole.constants.keys()


@pytest.mark.parametrize("name", ["smollm3", *slow("gemma3_text")])
def test_layers_of_two_kinds_in_turn(name: str) -> None:
    kinds = {
        "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
        "smollm3": {"no_rope_layers": [0, 1, 1, 0]},
    }
    model = skeleton_of(ROW[name].build(num_hidden_layers=4, **kinds[name]))
    whole = capture_decoder(model, stamp=False)
    assert content(capture_decoder(model)) == content(whole)


def test_a_scale_that_depends_on_the_layer_keeps_its_value(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changes = {"scale_attn_by_inverse_layer_idx": True}
    model = skeleton_of(ROW["gpt2"].build(**changes))
    traced = calls_of(GPT2Block, monkeypatch)
    capture = capture_decoder(model)
    assert traced["in the trace"] == 2
    assert len({layer.scale for layer in capture.layers}) == 2


def calls_of(kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the calls of a class's own forward."""
    forward, counts = kind.forward, Counter[str]()

    def counting(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        counts["in the trace" if torch.compiler.is_exporting() else "before"] += 1
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", counting)
    return counts


def test_32_equal_layers_are_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = skeleton_of(BY_NAME["llama"].build(num_hidden_layers=32))
    traced = calls_of(LlamaDecoderLayer, monkeypatch)
    capture = capture_decoder(model)
    assert traced == {"in the trace": 1, "before": 1}
    assert [layer.layer for layer in capture.layers] == list(range(32))


def test_a_layer_that_reads_its_number_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = LlamaDecoderLayer.forward

    def numbered(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs) * [1.0, 2.0, 3.0, 4.0][self.self_attn.layer_idx]

    monkeypatch.setattr(LlamaDecoderLayer, "forward", numbered)
    model = skeleton_of(BY_NAME["llama"].build(num_hidden_layers=4))
    assert content(capture_decoder(model)) == content(capture_decoder(model, stamp=False))


def test_a_layer_number_notes_that_it_was_read() -> None:
    number = LayerNumber(2)
    assert not number.read
    assert (10, 20, 30)[number] == 30
    assert number.read


def test_keys_differ_by_what_a_layer_can_read() -> None:
    layers = [nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(2)]
    for index, layer in enumerate(layers):
        vars(layer)["number"] = index
    places = numbers_of(layers)
    assert ("", "number") in places

    def equal() -> bool:
        return layer_key(layers[0], places) == layer_key(layers[1], places)

    assert equal()
    layers[1][1].running_mean.fill_(1.0)
    assert not equal()
    layers[1][1].running_mean.zero_()
    layers[1][1].eps = 0.5
    assert not equal()
