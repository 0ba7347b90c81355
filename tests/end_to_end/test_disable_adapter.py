"""`disable_adapter`: a reference pass every step writes no graph, and misses no change."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import bone_fx
from bone_fx.errors import UsageError
from tests.end_to_end.test_adapted import CONFIG, inputs, llama, logits, stir
from tests.tolerances import assert_agrees

pytestmark = pytest.mark.usefixtures("captures_once")


def tiny(**changes: Any) -> Any:
    return llama(num_hidden_layers=1, **changes)


@functools.cache
def captured(**changes: Any) -> bone_fx.AdaptedModule:
    adapted = bone_fx.adapt(tiny(**changes), CONFIG, inputs())
    stir(adapted, "default")
    return adapted


def stirred(**changes: Any) -> bone_fx.AdaptedModule:
    return copy.deepcopy(captured(**changes))


def without(adapted: bone_fx.AdaptedModule) -> Tensor:
    with adapted.disable_adapter():
        return logits(adapted)


@pytest.mark.slow
def test_each_form_is_compiled_once() -> None:
    adapted = stirred()
    base, own = without(adapted), logits(adapted)
    assert not torch.equal(base, own)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(adapted, backend=counter)
    for _ in range(10):
        torch.testing.assert_close(call(**inputs()).logits, own)
        with adapted.disable_adapter():
            torch.testing.assert_close(call(**inputs()).logits, base)
    assert counter.frame_count == 2


def test_a_preference_step_has_the_gradients_of_two_modules() -> None:
    adapted, reference = stirred(), tiny()
    expected = stirred()
    ids = inputs()["input_ids"]
    for _ in range(3):
        with torch.no_grad(), adapted.disable_adapter():
            apart = adapted(**inputs()).logits
        (
            adapted(**inputs(), labels=ids).loss
            + (apart - adapted(**inputs()).logits).square().mean()
        ).backward()
        with torch.no_grad():
            apart = reference(**inputs()).logits
        (
            expected(**inputs(), labels=ids).loss
            + (apart - expected(**inputs()).logits).square().mean()
        ).backward()
    trained = {n: p for n, p in expected.named_parameters() if p.requires_grad}
    assert len(trained) == 2
    for name, parameter in trained.items():
        gradient = adapted.get_parameter(name).grad
        assert gradient is not None
        assert parameter.grad is not None
        assert_agrees(gradient, parameter.grad, "gradient")


def to_train(adapted: bone_fx.AdaptedModule) -> None:
    adapted.train()


def to_layers(adapted: bone_fx.AdaptedModule) -> None:
    adapted.gradient_checkpointing_enable()


def to_another(adapted: bone_fx.AdaptedModule) -> None:
    adapted.add_adapter("other", CONFIG)
    stir(adapted, "other")
    adapted.set_adapter("other")


def to_none(adapted: bone_fx.AdaptedModule) -> None:
    adapted.delete_adapter("default")


def to_merged(adapted: bone_fx.AdaptedModule) -> None:
    adapted.merge_adapter()


@pytest.mark.parametrize("change", [to_train, to_layers, to_another, to_none, to_merged])
@pytest.mark.parametrize("inside", [False, True])
def test_a_change_reaches_both_forms(
    change: Callable[[bone_fx.AdaptedModule], None], inside: bool
) -> None:
    adapted, expected = stirred(), stirred()
    without(adapted)
    if inside:
        with adapted.disable_adapter():
            change(adapted)
    else:
        change(adapted)
    change(expected)
    for _ in range(2):
        torch.testing.assert_close(logits(adapted), logits(expected), rtol=0, atol=0)
        torch.testing.assert_close(without(adapted), logits(tiny()), rtol=0, atol=1e-6)
    assert adapted.training is expected.training
    assert adapted.is_gradient_checkpointing is expected.is_gradient_checkpointing
    assert list(adapted.state_dict()) == list(expected.state_dict())


@pytest.mark.parametrize("inside", [False, True])
def test_checkpointing_is_switched_in_both_forms(inside: bool) -> None:
    adapted = stirred()
    adapted.gradient_checkpointing_enable()
    without(adapted)
    if inside:
        with adapted.disable_adapter():
            adapted.gradient_checkpointing_disable()
    else:
        adapted.gradient_checkpointing_disable()
    assert all(layer.checkpointing is None for layer in adapted.layer_modules())
    with adapted.disable_adapter():
        assert all(layer.checkpointing is None for layer in adapted.layer_modules())


def test_dropout_is_switched_in_both_forms() -> None:
    adapted = stirred(attention_dropout=0.5).train()
    without(adapted)
    adapted.eval()
    assert torch.equal(without(adapted), without(adapted))
    with adapted.disable_adapter():
        adapted.train()
        assert not torch.equal(logits(adapted), logits(adapted))
    assert not torch.equal(logits(adapted), logits(adapted))


def test_a_cast_inside_reaches_what_comes_back() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)), torch.randn(6, 16)
    adapted = bone_fx.adapt(net, bone_fx.BoneConfig(r=4, target_modules=["0"]), (x,))
    adapted.merge_adapter()
    with adapted.disable_adapter():
        adapted.double()
    assert adapted(x.double()).dtype == torch.float64


def test_statistics_go_from_form_to_form() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)), torch.randn(6, 16)
    adapted = bone_fx.adapt(net, bone_fx.BoneConfig(r=4, target_modules=["0"]), (x,)).train()
    for number in range(1, 4):
        with adapted.disable_adapter():
            adapted(x)
        adapted(x)
        assert int(adapted.get_buffer("1.num_batches_tracked")) == 2 * number


def test_an_error_inside_gives_the_adapters_back() -> None:
    adapted = stirred()
    own = logits(adapted)
    for _ in range(2):
        with pytest.raises(UsageError), adapted.disable_adapter():
            adapted.set_adapter("absent")
        assert torch.equal(logits(adapted), own)


def test_a_graph_that_was_edited_is_switched_again() -> None:
    adapted = stirred().eval()
    (output,) = (node for node in adapted.graph.nodes if node.op == "output")
    logits_node = output.all_input_nodes[0]
    with adapted.graph.inserting_after(logits_node):
        dropped = adapted.graph.call_function(
            torch.ops.aten.dropout.default, (logits_node, 0.5, True)
        )
    logits_node.replace_all_uses_with(dropped, delete_user_cb=lambda user: user is not dropped)
    adapted.recompile()
    assert not torch.equal(logits(adapted), logits(adapted))
    assert torch.equal(logits(adapted.eval()), logits(adapted))
