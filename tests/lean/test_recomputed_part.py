"""A layer is cut behind the last thing that backward needs of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import bone_fx
from bone_fx.lean.form import LAYER, running_form
from bone_fx.lean.recomputed_part import cut_recomputed
from bone_fx.operators import ADAPTED_LINEAR, GATE_PRODUCT
from bone_fx.train.called_graph import LayerGraph, LeanLayerGraph
from tests.end_to_end.test_adapted import inputs, llama, stir
from tests.operators.saved import kept

pytestmark = pytest.mark.usefixtures("captures_once")

WIDTH = 8
aten = torch.ops.aten
LINEAR = aten.linear.default


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (nn.Parameter(torch.randn(WIDTH, WIDTH)) for _ in range(2))
        self.block = nn.Parameter(torch.randn(4, WIDTH))


def graph(write: Callable[[fx.Graph, Any], Any]) -> fx.Graph:
    """A graph of x whose output `write` gives."""
    made = fx.Graph()
    made.output(write(made, made.placeholder("x")))
    return made


def product(g: fx.Graph, x: Any, weight: str = "one") -> Any:
    return g.call_function(LINEAR, (x, g.get_attr(weight)))


def adapted(g: fx.Graph, x: Any, method: str, inputs: tuple[Any, ...] = ()) -> Any:
    blocks = [g.get_attr("block")]
    arguments = (x, g.get_attr("one"), None, blocks, [method], list(inputs), False)
    return g.call_function(ADAPTED_LINEAR, arguments)


def add(g: fx.Graph, x: Any, y: Any) -> Any:
    return g.call_function(aten.add.Tensor, (x, y))


def silu(g: fx.Graph, x: Any) -> Any:
    return g.call_function(aten.silu.default, (x,))


CUT: dict[str, tuple[Callable[..., Any], list[Any]]] = {
    "a product": (lambda g, x: product(g, silu(g, x)), [LINEAR]),
    "a residual sum": (lambda g, x: add(g, x, product(g, silu(g, x))), [LINEAR, aten.add.Tensor]),
    "two branches": (
        lambda g, x: add(g, product(g, silu(g, x)), product(g, x, "two")),
        [LINEAR, LINEAR, aten.add.Tensor],
    ),
    "Bone": (lambda g, x: adapted(g, silu(g, x), "bone"), [ADAPTED_LINEAR]),
    "more than one result": (lambda g, x: (silu(g, x), product(g, silu(g, x))), [LINEAR]),
}
WHOLE: dict[str, Callable[..., Any]] = {
    "BAT, which keeps its input": lambda g, x: adapted(g, silu(g, x), "bat"),
    "dropout on the branch": lambda g, x: adapted(g, silu(g, x), "bone", (x,)),
    "a product whose result is kept": lambda g, x: silu(g, product(g, x)),
    "a sum alone": lambda g, x: add(g, x, silu(g, x)),
}


@pytest.mark.parametrize("case", CUT)
def test_what_keeps_little_is_left_out(case: str) -> None:
    write, left_out = CUT[case]
    whole = graph(write)
    before = str(whole)
    parts = cut_recomputed(whole)
    assert parts is not None
    assert str(whole) == before
    recomputed, rest = parts
    for part in parts:
        part.lint()
    assert [n.target for n in rest.nodes if n.op == "call_function"] == left_out
    assert not [n for n in recomputed.nodes if n.target in (LINEAR, ADAPTED_LINEAR)]
    layer, x = Layer(), torch.randn(3, WIDTH)
    found = fx.GraphModule(layer, rest)(*fx.GraphModule(layer, recomputed)(x))
    expected = fx.GraphModule(layer, whole)(x)
    for one, other in zip(as_tuple(found), as_tuple(expected), strict=True):
        assert torch.equal(one, other)


def as_tuple(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize("case", ["a product", "Bone"])
def test_a_weight_that_trains_keeps_its_input(case: str) -> None:
    whole = graph(CUT[case][0])
    assert cut_recomputed(whole, {"two", "block"}) is not None
    assert cut_recomputed(whole, {"one"}) is None


@pytest.mark.parametrize("case", WHOLE)
def test_what_backward_needs_is_recomputed(case: str) -> None:
    assert cut_recomputed(graph(WHOLE[case])) is None


def split(method: str, **options: Any) -> tuple[bone_fx.AdaptedModule, list[LayerGraph]]:
    r, init = (8, "bat") if method == "bat" else (16, True)
    config = bone_fx.BoneConfig(r=r, target_modules="all-linear", init_weights=init)
    module = bone_fx.adapt(llama(), config, inputs(), **options).train()
    stir(module, "default")
    return module, module.layer_modules()


def test_a_bone_layer_of_a_llama_does_not_recompute_its_last_product() -> None:
    _, layers = split("bone")
    assert all(isinstance(layer, LeanLayerGraph) for layer in layers)
    parts = cut_recomputed(running_form(layers[0].graph, LAYER))
    assert parts is not None
    recomputed, rest = parts
    assert [n.target for n in recomputed.nodes].count(GATE_PRODUCT) == 1
    assert [n.target for n in rest.nodes].count(ADAPTED_LINEAR) == 1


@pytest.mark.parametrize("freeze_base", [True, False])
def test_the_input_of_a_last_product_is_not_kept(freeze_base: bool) -> None:
    module, _ = split("bone", freeze_base=freeze_base)
    module.gradient_checkpointing_enable()
    known = [*module.parameters(), *module.buffers()]
    widths = {t.shape[-1] for t in kept(lambda: module(**inputs()).logits.sum(), *known)}
    assert 48 in widths
    assert 80 not in widths


@pytest.mark.parametrize("method", ["bone", "bat"])
def test_losses_and_gradients_are_the_same(method: str) -> None:
    module, _ = split(method)
    results = []
    for _ in range(2):
        module.zero_grad()
        loss = module(**inputs(), labels=inputs()["input_ids"]).loss
        loss.backward()
        trained = [p for p in module.parameters() if p.requires_grad]
        results.append([loss.detach(), *(p.grad.clone() for p in trained if p.grad is not None)])
        module.gradient_checkpointing_enable()
    assert len(results[0]) == 15
    for plain, checkpointed in zip(*results, strict=True):
        assert torch.equal(plain, checkpointed)
