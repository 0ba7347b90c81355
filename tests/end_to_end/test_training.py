"""Training an adapted module: layers, recomputed activations, groups, several adapters."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import bone_fx
from bone_fx.errors import UsageError
from bone_fx.operators import HeadInputs
from bone_fx.operators.loss.linear_cross_entropy import CHUNK
from tests.end_to_end.test_adapted import BAT, CONFIG, Headed, inputs, llama, logits, stir

pytestmark = pytest.mark.usefixtures("captures_once")


def _step(adapted: bone_fx.AdaptedModule) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(5)
    adapted.zero_grad()
    loss = adapted(**inputs(), labels=inputs()["input_ids"]).loss
    loss.backward()
    return loss.detach(), {
        name: p.grad.clone() for name, p in adapted.named_parameters() if p.grad is not None
    }


def test_recomputed_activations_give_the_same_losses_and_gradients() -> None:
    config = bone_fx.BoneConfig(r=16, target_modules="all-linear", miss_dropout=0.2)
    adapted = bone_fx.adapt(llama(attention_dropout=0.1), config, inputs()).train()
    stir(adapted, "default")
    keys = list(adapted.state_dict())
    parameters = list(adapted.parameters())
    loss, gradients = _step(adapted)
    assert len(gradients) == 2 * 7
    kept = _bytes_kept(adapted)
    adapted.gradient_checkpointing_enable()
    assert adapted.is_gradient_checkpointing
    assert list(adapted.state_dict()) == keys
    assert {id(p) for p in adapted.parameters()} == {id(p) for p in parameters}
    again, regained = _step(adapted)
    assert torch.equal(again, loss)
    assert regained.keys() == gradients.keys()
    assert all(torch.equal(regained[name], g) for name, g in gradients.items())
    assert _bytes_kept(adapted) < 0.6 * kept
    adapted.gradient_checkpointing_disable()
    assert torch.equal(_step(adapted)[0], loss)
    with pytest.raises(UsageError, match="reentrant"):
        adapted.gradient_checkpointing_enable({"use_reentrant": True})


def _bytes_kept(adapted: bone_fx.AdaptedModule) -> int:
    """Bytes of activations that a forward keeps for backward."""
    own = {p.untyped_storage().data_ptr() for p in adapted.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = adapted(**inputs())
    del output
    return sum(kept.values())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_logits_are_left_to_the_loss(checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = bone_fx.adapt(llama(), CONFIG, inputs(), gradient_checkpointing=checkpointing).train()
    stir(adapted, "default")
    loss, gradients = _step(adapted)
    labels = inputs()["input_ids"]
    plain = adapted(**inputs(), labels=labels).logits
    formed: list[Tensor] = []
    form = HeadInputs.logits

    def noted(self: HeadInputs) -> Tensor:
        formed.append(form(self))
        return formed[-1]

    monkeypatch.setattr(HeadInputs, "logits", noted)
    monkeypatch.setitem(CHUNK, "cpu", 3 * plain.shape[-1])
    again, regained = _step(adapted)
    assert not formed
    torch.testing.assert_close(again, loss, rtol=1e-6, atol=0)
    assert regained.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(regained[name], gradient, rtol=1e-4, atol=1e-6)
    output = adapted(**inputs(), labels=labels)
    assert torch.equal(output.logits.detach(), plain.detach())
    assert output.logits is formed.pop()
    with torch.no_grad():
        assert torch.equal(adapted(**inputs(), labels=labels).logits, plain.detach())
    assert not formed


def test_a_term_of_the_logits_beside_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = bone_fx.adapt(llama(), CONFIG, inputs()).train()
    stir(adapted, "default")
    blocks = [p for p in adapted.parameters() if p.requires_grad]

    def gradients() -> tuple[Tensor, ...]:
        output = adapted(**inputs(), labels=inputs()["input_ids"], num_items_in_batch=5)
        return torch.autograd.grad(output.loss + output.logits.square().mean(), blocks)

    expected = gradients()
    monkeypatch.setitem(CHUNK, "cpu", 3 * 96)
    for found, other in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-6)
    output = adapted(**inputs(), labels=inputs()["input_ids"])
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(output.loss, output.logits)


def test_verbs_work_on_a_split_module() -> None:
    adapted = bone_fx.adapt(llama(), CONFIG, inputs(), gradient_checkpointing=True)
    stir(adapted, "default")
    first = logits(adapted)
    adapted.add_adapter("second", BAT)
    stir(adapted, "second")
    adapted.set_adapter(["default", "second"])
    assert adapted.is_gradient_checkpointing
    assert len(adapted.layer_modules()) == 2
    both = logits(adapted)
    torch.testing.assert_close(logits(adapted.fold()), both, rtol=0, atol=1e-5)
    copied = copy.deepcopy(adapted)
    assert torch.equal(logits(copied), both)
    assert all(layer.checkpointing is not None for layer in copied.layer_modules())
    adapted.set_adapter("default")
    assert torch.equal(logits(adapted), first)
    adapted.merge_adapter()
    torch.testing.assert_close(logits(adapted), first, rtol=0, atol=1e-5)


def test_adapters_differ_in_method_and_size_and_one_trains_under_another() -> None:
    adapted = bone_fx.adapt(llama(), CONFIG, inputs(), adapter_name="first").train()
    adapted.add_adapter("second", BAT)
    stir(adapted, "first")
    adapted.set_adapter(["first", "second"], train="second")
    optimizer = torch.optim.SGD(adapted.parameter_groups(), lr=0.1)
    before = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    _step(adapted)
    optimizer.step()
    moved = {
        name.rpartition(".")[2]
        for name, p in adapted.named_parameters()
        if not torch.equal(p, before[name])
    }
    assert moved == {"second"}
    assert adapted.active_adapters == ["first", "second"]
    with pytest.raises(UsageError, match="active"):
        adapted.set_adapter("first", train="second")


def test_groups_decay_matrices_only() -> None:
    config = bone_fx.BoneConfig(r=16, target_modules=["q_proj"], modules_to_save=["model.norm"])
    adapted = bone_fx.adapt(llama(), config, inputs())
    decayed, free = adapted.parameter_groups(weight_decay=0.1, lr=1e-3)
    assert len(decayed["params"]) == 2
    assert decayed["weight_decay"] == 0.1
    assert [list(p.shape) for p in free["params"]] == [[48]]
    assert free["weight_decay"] == 0.0
    assert decayed["lr"] == free["lr"] == 1e-3
    assert torch.optim.AdamW([decayed, free]).param_groups[0]["weight_decay"] == 0.1


def test_a_cast_after_capture_is_refused() -> None:
    adapted: Any = bone_fx.adapt(llama(), CONFIG, inputs())
    expected = logits(adapted)
    with pytest.raises(UsageError, match=r"before adapt\(\)"):
        adapted.to(torch.bfloat16)
    assert torch.equal(logits(adapted.to("cpu")), expected)


def test_a_model_without_layers_has_none() -> None:
    config = bone_fx.BoneConfig(r=4, target_modules=["body"])
    adapted = bone_fx.adapt(Headed().eval(), config, (torch.randn(3, 16),))
    with pytest.raises(UsageError, match="no layers"):
        adapted.gradient_checkpointing_enable()
    assert not adapted.is_gradient_checkpointing
