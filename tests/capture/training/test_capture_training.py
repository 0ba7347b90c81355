"""Training capture against eager: every architecture, at four sizes, dropout on and off."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.utils import _pytree as pytree

from bone_fx.graphs import copy_module
from bone_fx.passes.dropout import set_dropout
from bone_fx.train.split_layers import layers_of, split_in_place
from tests.capture.architectures import ARCHITECTURES, CORE, SHAPES, UNLISTED, Architecture
from tests.capture.training.captured import captured
from tests.tiers import tiered
from tests.tolerances import difference


def _gap(expected: object, got: object) -> float:
    pairs = zip(pytree.tree_leaves(expected), pytree.tree_leaves(got), strict=True)
    return max((difference(b, a) for a, b in pairs if isinstance(a, torch.Tensor)), default=0.0)


def _seeded(call: object, inputs: dict[str, torch.Tensor]) -> object:
    torch.manual_seed(7)
    return call(**inputs)


def _gradients(model: torch.nn.Module, output: object) -> dict[str, torch.Tensor | None]:
    first = next(t for t in pytree.tree_leaves(output) if t.is_floating_point())
    names = {name: p for name, p in model.named_parameters() if p.requires_grad}
    weights = torch.linspace(-1, 1, first.numel()).view_as(first)
    gradients = torch.autograd.grad(
        (first * weights).sum(), list(names.values()), allow_unused=True
    )
    return dict(zip(names, gradients, strict=True))


@pytest.mark.parametrize("row", tiered(ARCHITECTURES + UNLISTED, CORE), scope="session")
def test_equals_eager(row: Architecture) -> None:
    model, capture = captured(row.name)
    graph = capture.graph_module
    assert not capture.notes
    assert list(graph.state_dict()) == list(model.state_dict())
    named = dict(model.named_parameters(remove_duplicate=False))
    assert all(p is named[name] for name, p in graph.named_parameters(remove_duplicate=False))

    model.train()
    for shape in SHAPES:
        inputs = row.inputs(*shape)
        with torch.no_grad():
            expected = _seeded(model, {**inputs})
        got = _seeded(capture, inputs)
        assert type(got) is type(expected)
        assert _gap({k: expected[k] for k in got}, got) <= 1e-6, shape
    inputs = row.inputs(2, 7)
    ours = _gradients(graph, _seeded(capture, inputs))
    theirs = _gradients(model, _seeded(model, inputs))
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        if gradient is None:
            assert ours[name] is None, name
        else:
            torch.testing.assert_close(
                ours[name], gradient, rtol=1e-5, atol=1e-6 * gradient.abs().max().item(), msg=name
            )

    # The same, in layers whose activations are computed again in backward.
    split = copy_module(graph)
    split_in_place(split)
    assert len(layers_of(split)) >= 2
    for layer in layers_of(split).values():
        layer.checkpointing = {}
    again = _gradients(split, _seeded(partial(capture.signature.call, split), inputs))
    for name, gradient in ours.items():
        both = again[name], gradient
        assert both[0] is both[1] is None or torch.equal(*both), name

    set_dropout(graph, False)
    model.eval()
    for shape in SHAPES[:2]:
        inputs = row.inputs(*shape)
        with torch.no_grad():
            got, expected = capture(**inputs), model(**inputs)
            assert _gap({k: expected[k] for k in got}, got) <= 1e-6, shape
