"""One contestant of `bench_train.py` in a process of its own; prints one JSON line.

    python tools/train_case.py '{"case": "bone_fx bone", "base": "folder", "threads": 2,
                                 "batch": 4, "length": 128, "r": 64, "steps": 9, "rate": 1e-3,
                                 "device": "cpu", "dtype": "float32"}'

Cases: `floor`, `PEFT bone|bat|mini|lora`, `bone_fx bone|bat|mini`, and the latter with
`, compiled`, `, checkpointing` or `, kept` (BAT's folded weights are kept for backward); those of
PEFT and of bone_fx with `, one ulp` (each number of the base's linear layers is moved to one of its
neighbours in float32).
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    """Run the case that the argument describes."""
    warnings.filterwarnings("ignore")
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    print(json.dumps(run(settings)))


def run(settings: dict[str, Any]) -> dict[str, Any]:
    """Medians of the parts of a step in seconds, peak memory in GB, and the losses."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    dtype = getattr(torch, settings["dtype"])
    model: Any = AutoModelForCausalLM.from_pretrained(settings["base"], dtype=dtype).train()
    model.to(settings["device"])
    model.config.use_cache = False
    model.requires_grad_(requires_grad=False)
    for parameter in model.parameters():  # a mapped file is in memory once it was read
        parameter.sum()
    generator = torch.Generator().manual_seed(1)
    size = (settings["batch"], settings["length"])
    ids = torch.randint(0, model.config.vocab_size, size, generator=generator).to(model.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    gc.collect()
    loaded = _memory(model.device, "VmRSS")
    net = contestant(settings["case"], model, settings["r"], batch)
    params = [p for p in net.parameters() if p.requires_grad]
    if settings["case"] == "floor":
        numbers = _block_numbers(model, settings["r"])
        params.append(nn.Parameter(torch.zeros(numbers, device=model.device)))
        params[-1].grad = torch.zeros_like(params[-1])
    optimizer = torch.optim.AdamW(params, lr=settings["rate"])
    if settings["case"].endswith("compiled"):
        net = torch.compile(net)  # type: ignore[assignment]
    gc.collect()
    _forget_peak(model.device)
    times: dict[str, list[float]] = {"forward_s": [], "backward_s": [], "optimizer_s": []}
    losses = []
    for _ in range(settings["steps"]):
        start = _now(model.device)
        loss: Tensor = net(**batch).loss
        forward = _now(model.device)
        loss.backward()  # type: ignore[no-untyped-call]
        backward = _now(model.device)
        optimizer.step()
        optimizer.zero_grad(set_to_none=settings["case"] != "floor")
        end = _now(model.device)
        for values, value in zip(
            times.values(), (forward - start, backward - forward, end - backward), strict=True
        ):
            values.append(value)
        losses.append(float(loss.detach()))
    steps = [sum(parts) for parts in zip(*times.values(), strict=True)][2:]
    return {
        **{name: statistics.median(values[2:]) for name, values in times.items()},
        "step_s": statistics.median(steps),
        "memory_gb": (_memory(model.device, "VmHWM") - loaded) / 1e9,
        "parameters": sum(p.numel() for p in params),
        "accelerator": torch.cuda.get_device_name(model.device)
        if model.device.type == "cuda"
        else None,
        "losses": losses,
    }


def contestant(case: str, model: Any, r: int, batch: dict[str, Tensor]) -> nn.Module:
    """The module that trains, with its trainable parameters switched on."""
    if case == "floor":
        model.model.layers[0].input_layernorm.weight.requires_grad_(True)
        net: nn.Module = model
        return net
    who, method, *how = case.replace(",", "").split()
    if "ulp" in how:
        _move(model)
    fields: dict[str, Any] = {"r": r, "target_modules": TARGETS, "init_weights": True}
    if method in ("bat", "mini"):
        fields["init_weights"] = method
    if method == "mini":
        fields["mini_r"] = math.gcd(r, *(m.out_features for m in _linears(model)))
    if who == "bone_fx":
        import bone_fx

        return bone_fx.adapt(
            model,
            bone_fx.BoneConfig(**fields),
            batch,
            gradient_checkpointing="checkpointing" in how,
            recompute="kept" not in how,
        ).train()
    import peft

    if method == "lora":
        sizes = sum(m.in_features + m.out_features for m in _linears(model))
        rank = round(_block_numbers(model, r) / sizes)
        lora = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS)
        return peft.get_peft_model(model, lora)
    config = peft.MissConfig if method == "mini" else peft.BoneConfig
    return peft.get_peft_model(model, config(**fields))


def _move(model: nn.Module) -> None:
    """The smallest change that float32 can express, up or down by chance."""
    generator = torch.Generator().manual_seed(3)
    for layer in _linears(model):
        up = torch.rand(layer.weight.shape, generator=generator) < 0.5
        with torch.no_grad():
            layer.weight.copy_(
                torch.nextafter(
                    layer.weight, torch.where(up, torch.inf, -torch.inf).to(layer.weight)
                )
            )


def _linears(model: nn.Module) -> list[nn.Linear]:
    return [
        m
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and name.rpartition(".")[2] in TARGETS
    ]


def _block_numbers(model: nn.Module, r: int) -> int:
    return sum(r * m.out_features for m in _linears(model))


def _now(device: torch.device) -> float:
    """Seconds of a clock, when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _forget_peak(device: torch.device) -> None:
    """Begin the peak memory anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    ctypes.CDLL(None).malloc_trim(0)  # what the capture freed is not part of a step
    Path("/proc/self/clear_refs").write_text("5")


def _memory(device: torch.device, key: str) -> int:
    """Bytes in use (`VmRSS`) or their peak (`VmHWM`), of the process or of tensors on a GPU."""
    if device.type == "cuda":
        peak = key == "VmHWM"
        return (torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated)(device)
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


if __name__ == "__main__":
    main()
