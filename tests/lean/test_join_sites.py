"""Sites that read one x are one node as the graph runs, and one node each as it is shown."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import bone_fx
from bone_fx.graphs import copy_graph
from bone_fx.lean.form import LAYER, running_form
from bone_fx.lean.join_sites import join_sites
from bone_fx.operators import ADAPTED_LINEAR, ADAPTED_LINEARS
from tests.end_to_end.test_adapted import BAT, inputs, llama, stir
from tests.framed import modifies
from tests.tolerances import assert_agrees

pytestmark = pytest.mark.usefixtures("captures_once")

BONE = bone_fx.BoneConfig(r=20, target_modules="all-linear")
ALL_BAT = bone_fx.BoneConfig(r=8, target_modules="all-linear", init_weights="bat")
SITES = 14
LINEARS = "torch.ops.bone_fx.adapted_linears.default("
LINEAR = "torch.ops.bone_fx.adapted_linear.default("


def adapted_llama(config: bone_fx.BoneConfig = BONE, **options: Any) -> bone_fx.AdaptedModule:
    adapted = bone_fx.adapt(llama(**options.pop("fields", {})), config, inputs(), **options)
    stir(adapted, "default")
    return adapted.train()


def nodes(graph: fx.Graph, target: Any) -> list[fx.Node]:
    return [node for node in graph.nodes if node.target is target]


def step(call: Any, module: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    module.zero_grad()
    torch.manual_seed(3)
    loss = call(**inputs(), labels=inputs()["input_ids"]).loss
    loss.backward()
    found = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    return loss.detach(), found


@pytest.mark.parametrize("config", [BONE, ALL_BAT], ids=["bone", "bat"])
def test_what_runs_is_joined_and_what_is_shown_is_not(config: bone_fx.BoneConfig) -> None:
    adapted = adapted_llama(config)
    shown = copy_graph(adapted.graph)
    assert len(nodes(shown, ADAPTED_LINEAR)) == SITES
    assert not nodes(shown, ADAPTED_LINEARS)
    assert adapted.code.count(LINEARS) == 4  # q, k, v and gate, up of two layers
    assert adapted.code.count(LINEAR) == 4  # o and down

    joined = copy_graph(shown)
    assert modifies(join_sites, joined)
    joined.lint()
    assert [len(n.args[1]) for n in nodes(joined, ADAPTED_LINEARS)] == [3, 2, 3, 2]
    assert len(nodes(joined, ADAPTED_LINEAR)) == 4
    for node in nodes(joined, ADAPTED_LINEARS):
        items = sorted(node.users, key=lambda item: item.args[1])
        assert [item.args for item in items] == [(node, i) for i in range(len(node.args[1]))]
        assert all("val" in item.meta for item in items)
    assert str(shown) == str(adapted.graph)
    before = str(joined)
    assert not modifies(join_sites, joined)
    assert str(joined) == before

    flat = adapted._origin.signature.bind(**inputs())
    plain = fx.GraphModule(adapted, shown)(*flat)
    for found, expected in zip(adapted._graph_forward(*flat), plain, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("config", [BONE, ALL_BAT], ids=["bone", "bat"])
def test_gradients_are_those_of_the_shown_graph(config: bone_fx.BoneConfig) -> None:
    adapted = adapted_llama(config)
    (found, *_), (expected, *_) = (
        module(*adapted._origin.signature.bind(**inputs()))
        for module in (adapted._graph_forward, fx.GraphModule(adapted, copy_graph(adapted.graph)))
    )
    blocks = [p for p in adapted.parameters() if p.requires_grad]
    assert len(blocks) == SITES
    weights = torch.linspace(-1, 1, found.numel()).view_as(found)
    for ours, theirs in zip(
        torch.autograd.grad(found, blocks, weights),
        torch.autograd.grad(expected, blocks, weights),
        strict=True,
    ):
        assert_agrees(ours, theirs, "gradient")


def test_dropout_and_mini_and_two_adapters_keep_their_node() -> None:
    def joined(adapted: bone_fx.AdaptedModule) -> int:
        assert len(nodes(adapted.graph, ADAPTED_LINEAR)) == SITES
        return adapted.code.count(LINEARS)

    targets = {"target_modules": "all-linear"}
    assert not joined(adapted_llama(bone_fx.BoneConfig(r=16, miss_dropout=0.2, **targets)))
    mini = bone_fx.BoneConfig(r=16, init_weights="mini", mini_r=8, **targets)
    assert not joined(adapted_llama(mini))
    adapted = adapted_llama()
    adapted.add_adapter("second", BAT)  # on q and v
    assert joined(adapted) == 4
    adapted.set_adapter(["default", "second"])
    assert joined(adapted) == 2  # k is alone now
    adapted.set_adapter("default")
    assert joined(adapted) == 4
    with adapted.disable_adapter():
        assert not adapted.code.count("adapted_linear")


def test_a_folded_or_merged_graph_has_nothing_to_join() -> None:
    adapted = adapted_llama()
    assert "adapted_linear" not in adapted.fold().code
    adapted.merge_adapter()
    assert "adapted_linear" not in adapted.code


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 8), nn.Linear(12, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), self.b(x)], -1)


class Parallel(nn.Module):
    """Elements of a list that read one x."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Pair() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x) for layer in self.layers])


def test_layers_that_share_an_input_are_not_joined() -> None:
    config = bone_fx.BoneConfig(r=4, target_modules="all-linear")
    x = torch.randn(3, 12)
    adapted = bone_fx.adapt(Parallel(), config, (x,))
    stir(adapted, "default")
    joined = nodes(running_form(adapted.graph, LAYER), ADAPTED_LINEARS)
    assert [[str(weight.target) for weight in node.args[1]] for node in joined] == [
        [f"layers.{i}.a.weight", f"layers.{i}.b.weight"] for i in range(2)
    ]
    expected = adapted(x)
    assert len(adapted.layer_modules()) == 2
    assert torch.equal(adapted(x), expected)


def test_a_graph_without_layers_is_joined_whole() -> None:
    traced = fx.symbolic_trace(Pair())
    config = bone_fx.BoneConfig(r=4, target_modules="all-linear")
    gm = bone_fx.insert_adapters(traced, config).graph_module
    with torch.no_grad():
        gm.get_parameter("a.bone_block.default").normal_()
    lean = running_form(gm.graph, LAYER)
    assert len(nodes(lean, ADAPTED_LINEARS)) == 1
    x = torch.randn(3, 12)
    assert torch.equal(fx.GraphModule(gm, lean)(x), gm(x))


@pytest.mark.parametrize("config", [BONE, ALL_BAT], ids=["bone", "bat"])
def test_split_and_checkpointed_layers_are_the_flat_graph(config: bone_fx.BoneConfig) -> None:
    adapted = adapted_llama(config, fields={"attention_dropout": 0.1})
    loss, gradients = step(adapted, adapted)
    assert len(gradients) == SITES
    layers = adapted.layer_modules()
    assert [layer.code.count(LINEARS) for layer in layers] == [2, 2]
    assert sum(len(nodes(layer.graph, ADAPTED_LINEAR)) for layer in layers) == SITES
    for checkpointing in (False, True):
        if checkpointing:
            adapted.gradient_checkpointing_enable()
        again, regained = step(adapted, adapted)
        assert torch.equal(again, loss)
        assert all(torch.equal(regained[name], g) for name, g in gradients.items())


def test_copies_and_modes_run_joined_too() -> None:
    adapted = adapted_llama(fields={"attention_dropout": 0.3})
    trained = step(adapted, adapted)[0]
    adapted.eval()
    evaluated = step(adapted, adapted)[0]
    assert not torch.equal(evaluated, trained)
    assert len(nodes(adapted.graph, ADAPTED_LINEAR)) == SITES
    copied = copy.deepcopy(adapted)
    for module in (adapted, copied):
        assert module.code.count(LINEARS) == 4
        assert torch.equal(step(module, module)[0], evaluated)
        module.train()
        assert module.code.count(LINEARS) == 4
        assert torch.equal(step(module, module)[0], trained)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert torch.equal(step(adapted, adapted)[0], trained)


def test_bat_that_keeps_its_weights_is_the_same_to_the_bit() -> None:
    found = []
    for recompute in (True, False):
        adapted = adapted_llama(ALL_BAT, recompute=recompute)
        assert adapted.code.count(LINEARS) == 4
        found.append(step(adapted, adapted))
    (loss, gradients), (other, regained) = found
    assert torch.equal(loss, other)
    assert all(torch.equal(regained[name], g) for name, g in gradients.items())
