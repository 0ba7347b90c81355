"""`torch.compile` of an adapted module: one graph, the losses and gradients of eager."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bone_fx
from bone_fx.errors import InputRefusedError
from bone_fx.operators import joint_linear
from tests.end_to_end.test_adapted import inputs, llama, stir
from tests.operators.saved import kept, shapes
from tests.tiers import slow
from tests.tolerances import assert_agrees

pytestmark = pytest.mark.usefixtures("captures_once")

METHODS: dict[str, dict[str, Any]] = {
    "bone": {"r": 16, "init_weights": True},
    "bat": {"r": 8, "init_weights": "bat"},
}

METHOD_CONFIG = bone_fx.BoneConfig(r=16, target_modules="all-linear")


def step(adapted: bone_fx.AdaptedModule, call: Any) -> tuple[Tensor, dict[str, Tensor]]:
    adapted.zero_grad()
    loss = call(**inputs(), labels=inputs()["input_ids"]).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in adapted.named_parameters() if p.grad is not None}


def compiled(adapted: bone_fx.AdaptedModule, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(adapted, backend="aot_eager", **options)


@pytest.mark.parametrize("method", ["bone", *slow("bat")])
def test_a_compiled_step_is_the_eager_one_without_a_graph_break(method: str) -> None:
    config = bone_fx.BoneConfig(target_modules="all-linear", **METHODS[method])
    adapted = bone_fx.adapt(llama(), config, inputs()).train()
    stir(adapted, "default")
    loss, gradients = step(adapted, adapted)
    assert len(gradients) == 14
    again, regained = step(adapted, compiled(adapted, fullgraph=True))
    assert_agrees(again, loss, "logits")
    for name, gradient in gradients.items():
        assert_agrees(regained[name], gradient, "gradient")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's, on importing inductor
@pytest.mark.parametrize(("method", "recompute"), [("bone", True), ("bat", True), ("bat", False)])
def test_a_compiled_step_keeps_a_folded_weight_only_if_asked_to(
    method: str, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(joint_linear.FOLD_ABOVE, "cpu", 0.0)
    config = bone_fx.BoneConfig(target_modules="all-linear", **METHODS[method])
    adapted = bone_fx.adapt(llama(), config, inputs(), recompute=recompute).train()
    torch._dynamo.reset()
    # Partitioned as inductor has it: what is kept is what the compiler chose to keep.
    call = torch.compile(adapted, backend="aot_eager_decomp_partition")
    call(**inputs(), labels=inputs()["input_ids"])
    found = kept(
        lambda: call(**inputs(), labels=inputs()["input_ids"]),
        *adapted.parameters(),
        *adapted.buffers(),
    )
    layers = [module for module in llama().model.modules() if isinstance(module, nn.Linear)]
    # Nothing before the first layer trains, so that its q, k and v multiply no gradient.
    weights = sorted(sorted(layer.weight.shape) for layer in layers[3:])
    folded = sorted(sorted(shape) for shape in shapes(found) if sorted(shape) in weights)
    assert folded == ([] if recompute else weights)


@pytest.mark.slow
def test_under_autocast_it_compiles_to_one_graph_too() -> None:
    config = bone_fx.BoneConfig(target_modules="all-linear", **METHODS["bat"])
    adapted = bone_fx.adapt(llama(), config, inputs()).train()
    stir(adapted, "default")
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradients = step(adapted, adapted)
        again, regained = step(adapted, compiled(adapted, fullgraph=True))
    assert_agrees(again, loss, "logits", torch.bfloat16)
    assert regained.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert regained[name].dtype == torch.float32
        assert float((regained[name] - gradient).norm()) <= 0.1 * float(gradient.norm())


@pytest.mark.slow
def test_a_batch_of_another_size_compiles_to_one_graph_too() -> None:
    adapted = bone_fx.adapt(llama(), METHOD_CONFIG, inputs()).train()
    stir(adapted, "default")
    call = compiled(adapted, fullgraph=True)
    for rows, length in ((2, 7), (3, 9), (5, 4)):
        ids = torch.randint(0, 96, (rows, length), generator=torch.Generator().manual_seed(rows))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        assert_agrees(call(**batch).loss, adapted(**batch).loss, "logits")


@pytest.mark.slow
def test_positions_without_a_mask_compile_to_one_graph_too() -> None:
    ids = inputs()["input_ids"]
    positions = torch.arange(7).expand(2, 7)
    example = {**inputs(), "position_ids": positions}
    adapted = bone_fx.adapt(llama(), METHOD_CONFIG, example).train()
    stir(adapted, "default")
    call = compiled(adapted, fullgraph=True)
    given = {"input_ids": ids, "position_ids": positions, "labels": ids}
    assert_agrees(call(**given).loss, adapted(**given).loss, "logits")
    packed = {"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]]).expand(2, 7)}
    with pytest.raises(InputRefusedError, match="restart"):
        adapted(**packed)
    with pytest.raises(RuntimeError, match="restart"):
        compiled(adapted)(**packed, labels=ids)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # dynamo says that it leaves this call to Python
def test_sizes_that_do_not_fit_are_refused_by_a_compiled_call() -> None:
    config = bone_fx.BoneConfig(r=16, target_modules=["q_proj"])
    call = compiled(bone_fx.adapt(llama(), config, inputs()))
    ids = inputs()["input_ids"]
    call(**inputs())
    with pytest.raises(InputRefusedError, match="disagree"):
        call(input_ids=ids, attention_mask=torch.ones(2, 6, dtype=torch.long))


@pytest.mark.slow
def test_a_compiled_module_follows_its_verbs() -> None:
    adapted = bone_fx.adapt(llama(attention_dropout=0.5), METHOD_CONFIG, inputs()).train()
    stir(adapted, "default")
    call = compiled(adapted)
    call(**inputs())
    adapted.eval()
    torch.testing.assert_close(call(**inputs()).logits, adapted(**inputs()).logits)
    with adapted.disable_adapter():
        torch.testing.assert_close(call(**inputs()).logits, adapted(**inputs()).logits)
    adapted.merge_adapter()
    torch.testing.assert_close(call(**inputs()).logits, adapted(**inputs()).logits)


def test_a_compiled_graph_without_layers_follows_its_mode() -> None:
    net = nn.Sequential(nn.Linear(48, 16), nn.Dropout(0.5), nn.Linear(16, 4))
    x = torch.randn(3, 48)
    config = bone_fx.BoneConfig(r=8, target_modules=["0"], init_weights=False)
    adapted = bone_fx.adapt(net.train(), config, (x,)).train()
    call = compiled(adapted)
    call(x)
    adapted.eval()
    torch.testing.assert_close(call(x), adapted(x))
    with adapted.disable_adapter():
        torch.testing.assert_close(call(x), net.eval()(x))
