"""Training on a GPU: a module that was captured on the CPU, against the CPU and against PEFT."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import bone_fx
from bone_fx.errors import InputRefusedError
from bone_fx.operators import ATTENTION
from tests.end_to_end import test_peft as peft_cases
from tests.end_to_end.test_adapted import CONFIG, inputs, llama, stir
from tests.end_to_end.test_trainer import adapted_llama, arguments, losses, rows

pytestmark = pytest.mark.gpu

METHODS: dict[str, dict[str, Any]] = {
    "bone": {"r": 16, "init_weights": True},
    "bat": {"r": 8, "init_weights": "bat"},
    "mini": {"r": 8, "init_weights": "mini", "mini_r": 4},
}
DTYPES = [torch.float16, torch.bfloat16]
NOISE = {"bone": 0.02, "bat": 0.02, "mini": 0.2}
"""Of gradients in bfloat16, relative. PEFT's on a CPU: 0.009, 0.007, 0.103; in float16 a fifth of
these at most."""


def on_gpu(value: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.to("cuda"), value)


def batch(rows: int = 2, length: int = 7) -> dict[str, Tensor]:
    ids = torch.randint(0, 96, (rows, length), generator=torch.Generator().manual_seed(rows))
    mask = torch.ones_like(ids)
    mask[-1, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids}


def adapted(method: str = "bone", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """On the CPU, every linear layer adapted, blocks away from zero."""
    config = bone_fx.BoneConfig(target_modules="all-linear", **METHODS[method])
    module = bone_fx.adapt(llama().to(dtype), config, batch(), **options).train()
    stir(module, "default")
    return module


def train(module: Any, given: dict[str, Tensor], steps: int = 6) -> list[float]:
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = module(**given).loss
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


def gradients(module: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
    module.zero_grad()
    module(**given).loss.backward()
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def peak(module: Any, given: dict[str, Tensor]) -> int:
    """Bytes that a step takes above what is there before it."""
    module.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    module(**given).loss.backward()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_losses_are_those_of_the_cpu(method: str, checkpointing: bool) -> None:
    module = adapted(method, torch.float64, gradient_checkpointing=checkpointing)
    expected = train(copy.deepcopy(module), batch())
    assert expected[-1] < expected[0] - 0.02
    assert train(module.to("cuda"), on_gpu(batch())) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("method", ["bone", "bone random", "bat", "mini", "miss"])
def test_losses_are_those_of_peft(method: str) -> None:
    fields, targets = peft_cases.METHODS[method], peft_cases.TARGETS
    torch.manual_seed(7)
    theirs = peft_cases.in_peft(peft_cases.llama(), fields, target_modules=targets).train()
    torch.manual_seed(7)
    config = bone_fx.BoneConfig(target_modules=targets, **fields)
    ours = bone_fx.adapt(peft_cases.llama(), config, batch()).train()
    expected = train(theirs.to("cuda"), on_gpu(batch()), 20)
    found = train(ours.to("cuda"), on_gpu(batch()), 20)
    assert expected[-1] < expected[0] - 0.1
    for own, other in zip(found, expected, strict=True):
        assert abs(own - other) <= 1e-4 * max(1.0, other)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_is_the_same_twice(method: str) -> None:
    module = adapted(method).to("cuda")
    first = gradients(module, on_gpu(batch()))
    again = gradients(module, on_gpu(batch()))
    assert first.keys() == again.keys()
    assert all(torch.equal(again[name], gradient) for name, gradient in first.items())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_half_precision(method: str, dtype: torch.dtype) -> None:
    limit = NOISE[method] / (4 if dtype == torch.float16 else 1)
    exact = gradients(adapted(method, torch.float64), batch())
    base = adapted(method, dtype).to("cuda")
    under_autocast = adapted(method).to("cuda")
    for module in (base, under_autocast):
        with torch.autocast("cuda", dtype, enabled=module is under_autocast):
            found = gradients(module, on_gpu(batch()))
        assert found.keys() == exact.keys()
        for name, gradient in found.items():
            assert module.get_parameter(name).dtype == gradient.dtype == torch.float32
        whole, of_cpu = (
            torch.cat([gradient.cpu().double().flatten() for gradient in kind.values()])
            for kind in (found, {name: exact[name] for name in found})
        )
        assert float((whole - of_cpu).norm()) <= limit * float(of_cpu.norm())


@pytest.mark.parametrize("method", METHODS)
def test_compiled(method: str) -> None:
    torch._dynamo.reset()
    module = adapted(method).to("cuda")
    expected = gradients(module, on_gpu(batch()))
    module.zero_grad()
    torch.compile(module, fullgraph=True)(**on_gpu(batch())).loss.backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            module.get_parameter(name).grad,
            gradient,
            rtol=1e-3,
            atol=1e-4 * float(gradient.abs().max()),
        )


def test_bat_keeps_no_folded_weight_and_checkpointing_keeps_less() -> None:
    def of(init: Any, size: tuple[int, int], **options: Any) -> int:
        config = bone_fx.BoneConfig(r=64, target_modules="all-linear", init_weights=init)
        wide = {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 64}
        model = llama(num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4, **wide)
        module = bone_fx.adapt(model, config, batch(), **options).train().to("cuda")
        return peak(module, on_gpu(batch(*size)))

    recomputed, kept = of("bat", (2, 7)), of("bat", (2, 7), recompute=False)
    weights = 8 * (2 * 512 * 512 + 2 * 512 * 256 + 3 * 512 * 1024) * 4
    assert kept - recomputed >= 0.8 * weights
    activations = of(True, (8, 512))
    assert of(True, (8, 512), gradient_checkpointing=True) < 0.6 * activations


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_heads_form_no_scores(dtype: torch.dtype, masked: bool) -> None:
    heads, groups, tokens, size = 4, 2, 2048, 64
    q, k, v = (
        torch.randn(2, n, tokens, size, device="cuda", dtype=dtype, requires_grad=True)
        for n in (heads, groups, groups)
    )
    mask = torch.ones(2, 1, tokens, tokens, dtype=torch.bool, device="cuda").tril()
    if masked:
        mask[1, :, :, -8:] = False
        mask[..., 0] = True
    y = ATTENTION(q, k, v, mask, enable_gqa=True)
    many = [t.repeat_interleave(heads // groups, 1) for t in (k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(q, *many, mask)
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
    del many, expected, y
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ATTENTION(q, k, v, mask, enable_gqa=True).sum().backward()
    scores = 2 * heads * tokens * tokens * q.element_size()
    added = 2 * tokens * tokens * q.element_size()
    assert torch.cuda.max_memory_allocated() - before < scores / 2 + added * masked


def test_trainer_moves_the_module(tmp_path: Path) -> None:
    settings = {"per_device_train_batch_size": 8, "save_strategy": "steps", "save_steps": 3}
    on_cpu = adapted_llama()
    kinds = {
        "cpu": (on_cpu, {"use_cpu": True}),
        "cuda": (adapted_llama(), {"use_cpu": False}),
        "bf16": (adapted_llama(), {"use_cpu": False, "bf16": True}),
    }
    found = {}
    for name, (module, changes) in kinds.items():
        trainer = bone_fx.AdapterTrainer(
            model=module,
            args=arguments(tmp_path / name, **{**settings, **changes}),
            train_dataset=rows(),
            eval_dataset=rows(),
        )
        trainer.train()
        found[name] = losses(trainer)
        assert (tmp_path / name / "checkpoint-6" / "adapter_model.safetensors").exists()
        assert {p.device.type for p in module.parameters()} == {"cpu" if name == "cpu" else "cuda"}
    assert found["cuda"] == pytest.approx(found["cpu"], rel=1e-4)
    assert found["bf16"] == pytest.approx(found["cpu"], rel=2e-2)


def test_what_comes_out_is_where_the_module_is(tmp_path: Path) -> None:
    model = llama()
    module = bone_fx.adapt(model, CONFIG, inputs()).eval()
    stir(module, "default")
    expected = module(**inputs()).logits.detach()
    module.to("cuda")
    given = on_gpu(inputs())
    found = module(**given).logits.detach()
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)
    merged: Any = module.merge_and_unload()
    assert {t.device.type for t in (*merged.parameters(), *merged.buffers())} == {"cuda"}
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    torch.testing.assert_close(merged(**given).logits, found, rtol=1e-4, atol=1e-4)
    assert merged.generate(**given, max_new_tokens=3, do_sample=False).shape == (2, 10)
    torch.testing.assert_close(module.fold()(**given).logits, found, rtol=1e-4, atol=1e-4)
    with module.disable_adapter():
        base = module(**given).logits
    torch.testing.assert_close(base.cpu(), model(**inputs()).logits, rtol=1e-4, atol=1e-4)
    module.save_pretrained(tmp_path)
    again = bone_fx.adapt(model, tmp_path, inputs()).eval()
    torch.testing.assert_close(again(**inputs()).logits, expected, rtol=0, atol=0)


def test_a_model_on_a_gpu_takes_examples_from_the_cpu() -> None:
    module = bone_fx.adapt(llama().to("cuda"), CONFIG, inputs()).eval()
    stir(module, "default")
    there = module(**on_gpu(inputs())).logits.detach().cpu()
    torch.testing.assert_close(
        module.to("cpu")(**inputs()).logits.detach(), there, rtol=1e-4, atol=1e-4
    )


def test_packed_positions_without_a_mask_are_refused() -> None:
    given = {"input_ids": inputs()["input_ids"], "position_ids": torch.arange(7).expand(2, 7)}
    module = bone_fx.adapt(llama(), CONFIG, given).to("cuda")
    restarting = {**given, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]] * 2)}
    with pytest.raises(InputRefusedError, match="restart"):
        module(**on_gpu(restarting))


def test_fsdp_moves_what_it_shards(tmp_path: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    expected = train(adapted(), batch())
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    dist.init_process_group("nccl", rank=0, world_size=1)
    try:
        module = adapted(gradient_checkpointing=True)
        for layer in module.layer_modules():
            fully_shard(layer)
        fully_shard(module)
        found = train(module, on_gpu(batch()))
        assert found == pytest.approx(expected, rel=1e-4)
        module.save_pretrained(tmp_path)
    finally:
        dist.destroy_process_group()
    assert (tmp_path / "adapter_model.safetensors").exists()
