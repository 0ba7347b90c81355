"""One contestant of `bench_train.py` in a process of its own; prints one JSON line.

    python tools/train_case.py '{"case": "bone_fx bone", "base": "folder", "threads": 2,
                                 "batch": 4, "length": 128, "r": 64, "steps": 9, "rate": 1e-3,
                                 "device": "cpu", "dtype": "float32"}'

Cases: `floor`, `PEFT bone|bat|mini|lora`, `bone_fx bone|bat|mini`, and the latter with
`, checkpointing` or `, kept` (BAT's folded weights are kept for backward); those of PEFT and of
bone_fx with `, compiled`, with `, cuda graphs` (compiled, and replayed as CUDA graphs) or with
`, one ulp` (each number of the base's linear layers is moved to one of its neighbours in float32).
A `"shape"` in place of a base is a configuration with random weights.

With `"cases": [...]` instead of a case, those train in one process, a step each in turn, and each
step's times are printed; memory is not measured.
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

UNTIMED = 2
"""Steps at first that are not timed: caches fill, and a compiler compiles."""

SHAPES: dict[str, dict[str, Any]] = {
    "llama-1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "llama-tiny": {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
"""Sizes of Llamas with tied embeddings."""

NO_KERNEL = {
    *("aten::empty", "aten::empty_strided", "aten::empty_like", "aten::as_strided", "aten::view"),
    *("aten::transpose", "aten::slice", "aten::detach", "aten::alias", "aten::expand"),
    *(
        "aten::unsqueeze",
        "aten::squeeze",
        "aten::select",
        "aten::resolve_conj",
        "aten::result_type",
    ),
    *("aten::_unsafe_view", "aten::_reshape_alias", "aten::t", "aten::permute", "aten::narrow"),
    *("aten::is_nonzero", "aten::item", "aten::_local_scalar_dense", "aten::split_with_sizes"),
    *("aten::lift_fresh", "aten::resize_", "aten::set_", "aten::resolve_neg", "aten::detach_"),
}
"""Operators that start no kernel."""

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    """Run the case that the argument describes."""
    warnings.filterwarnings("ignore")
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    print(json.dumps(in_turn(settings) if "cases" in settings else run(settings)))


def run(settings: dict[str, Any]) -> dict[str, Any]:
    """Medians of the parts of a step in seconds, peak memory in GB, and the losses."""
    model, batch = _load(settings)
    gc.collect()
    loaded = _memory(model.device, "VmRSS")
    training = Training(settings["case"], model, batch, settings)
    gc.collect()
    _forget_peak(model.device)
    for _ in range(settings["steps"]):
        training.step()
    timed = training.steps[UNTIMED:]
    return {
        **{part: statistics.median(step[part] for step in timed) for part in timed[0]},
        **training.counted(),
        "memory_gb": (_memory(model.device, "VmHWM") - loaded) / 1e9,
        **training.described(),
    }


def in_turn(settings: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The parts of every timed step in seconds, and the losses, of each case."""
    trainings = {name: Training(name, *_load(settings), settings) for name in settings["cases"]}
    for turn in range(settings["steps"]):
        names = list(trainings)
        for name in names if turn % 2 == 0 else names[::-1]:
            trainings[name].step()
    return {
        name: [{**step, **training.described()} for step in training.steps[UNTIMED:]]
        for name, training in trainings.items()
    }


def _load(settings: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """The frozen model, in memory, and random tokens with labels."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    dtype = getattr(torch, settings["dtype"])
    model: Any
    if settings.get("shape"):
        from transformers import LlamaConfig

        config = LlamaConfig(**SHAPES[settings["shape"]], tie_word_embeddings=True)
        with torch.device(settings["device"]):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()  # type: ignore[no-untyped-call]
    else:
        model = AutoModelForCausalLM.from_pretrained(settings["base"], dtype=dtype).train()
        model.to(settings["device"])
    model.config.use_cache = False
    model.requires_grad_(requires_grad=False)
    for parameter in model.parameters():  # a mapped file is in memory once it was read
        parameter.sum()
    generator = torch.Generator().manual_seed(1)
    size = (settings["batch"], settings["length"])
    ids = torch.randint(0, model.config.vocab_size, size, generator=generator).to(model.device)
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


class Training:
    """A contestant with its optimizer, and what its steps took.

    Attributes:
        steps: `forward_s`, `backward_s`, `optimizer_s` and their sum `step_s`, of each step.
        losses: Of each step.
    """

    def __init__(
        self, case: str, model: Any, batch: dict[str, Tensor], settings: dict[str, Any]
    ) -> None:
        self.case, self.device, self.batch = case, model.device, batch
        self.net = contestant(case, model, settings["r"], batch)
        self.params = [p for p in self.net.parameters() if p.requires_grad]
        if case == "floor":
            numbers = _block_numbers(model, settings["r"])
            self.params.append(nn.Parameter(torch.zeros(numbers, device=model.device)))
            self.params[-1].grad = torch.zeros_like(self.params[-1])
        self.optimizer = torch.optim.AdamW(self.params, lr=settings["rate"])
        if case.endswith("compiled"):
            self.net = torch.compile(self.net)  # type: ignore[assignment]
        elif case.endswith("cuda graphs"):
            self.net = torch.compile(self.net, mode="reduce-overhead")  # type: ignore[assignment]
        self.steps: list[dict[str, float]] = []
        self.losses: list[float] = []

    def step(self) -> None:
        """One step."""
        if self.case.endswith("cuda graphs"):
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        start = _now(self.device)
        loss: Tensor = self.net(**self.batch).loss
        forward = _now(self.device)
        loss.backward()  # type: ignore[no-untyped-call]
        backward = _now(self.device)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=self.case != "floor")
        end = _now(self.device)
        self.steps.append(
            {
                "forward_s": forward - start,
                "backward_s": backward - forward,
                "optimizer_s": end - backward,
                "step_s": end - start,
            }
        )
        self.losses.append(float(loss.detach()))

    def counted(self) -> dict[str, int]:
        """Kernels that one more step starts, and functions of Python that another one calls.

        On a CPU kernels are operators that compute.
        """
        import cProfile
        import pstats

        from torch.profiler import ProfilerActivity, profile

        with cProfile.Profile() as calls:
            self.step()
        kinds = [ProfilerActivity.CPU]
        kinds += [ProfilerActivity.CUDA] * (self.device.type == "cuda")
        with profile(activities=kinds) as run:
            self.step()
        del self.steps[-2:], self.losses[-2:]
        found = {"python_calls": int(pstats.Stats(calls).total_calls)}  # type: ignore[attr-defined]
        events = run.events() or []
        if self.device.type == "cuda":
            launches = sum(
                e.name.startswith(("cudaLaunchKernel", "cuLaunchKernel")) for e in events
            )
            return {**found, "kernels": launches}
        leaves = (e.name for e in events if not e.cpu_children)
        kernels = sum(n.startswith("aten::") and n not in NO_KERNEL for n in leaves)
        return {**found, "kernels": kernels}

    def described(self) -> dict[str, Any]:
        """What its steps have in common."""
        return {
            "parameters": sum(p.numel() for p in self.params),
            "accelerator": torch.cuda.get_device_name(self.device)
            if self.device.type == "cuda"
            else None,
            "losses": self.losses,
        }


def contestant(case: str, model: Any, r: int, batch: dict[str, Tensor]) -> nn.Module:
    """The module that trains, with its trainable parameters switched on."""
    if case == "floor":
        model.model.layers[0].input_layernorm.weight.requires_grad_(True)
        net: nn.Module = model
        return net
    who, method, *how = case.replace(",", "").split()  # such as `bone_fx bone, cuda graphs`
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
