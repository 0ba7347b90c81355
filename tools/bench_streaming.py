"""Export of a checkpoint that is larger than memory should be: peak memory, and time against `cp`.

A synthetic checkpoint of Llama-3-8B's shape (bf16 shards, vocabulary 128256 x 4096, 16 GB) with a
Bone block, or a LoRA or DoRA of as many numbers, on every linear layer is exported to fp16 without
verification. Beside it, `cp` of the same files followed by `sync`. Needs three times the size on
disk; `--layers` makes it smaller and leaves the largest tensor as it is.

    python tools/bench_streaming.py                # 16 GB
    python tools/bench_streaming.py --layers 4     # 3.8 GB
    python tools/bench_streaming.py --adapter lora
    python tools/bench_streaming.py --rounds 3 --json rows.jsonl
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from benching import Measured, folder_bytes, interleave, measure, ratios, report, spread
from rich.console import Console
from safetensors.torch import save_file

ROOT = Path(__file__).parents[1]
HIDDEN, INNER, KV_HEADS, HEADS, VOCABULARY, R = 4096, 14336, 8, 32, 128256, 64
LORA_R = R // 2
"""With A and B, as many numbers as a Bone block of R has."""
SHARD_BYTES = 4 << 30
COLUMNS = {
    "what": "what",
    "layers": "layers",
    "adapter": "adapter",
    "input_gb": "checkpoint, GB",
    "wall_s": "wall, s",
    "of_cp": "of cp + sync",
    "peak_gb": "peak, GB",
}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--adapter", choices=("bone", "lora", "dora"), default="bone")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path, help="append the rows to this file")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench", help="folder to use")
    arguments = parser.parse_args()
    console = Console()
    work = arguments.work / f"llama-{arguments.layers}"
    base, adapter = work / "base", work / f"adapter-{arguments.adapter}"
    if not (base / "model.safetensors.index.json").exists():
        console.print("writing the checkpoint", style="dim")
        write_base(base, arguments.layers)
    if not (adapter / "adapter_config.json").exists():
        write_adapter(adapter, arguments.layers, arguments.adapter)
    exported, copied = work / "export", work / "copy"

    def export() -> Measured:
        shutil.rmtree(exported, ignore_errors=True)
        command: list[str | Path] = [sys.executable, "-m", "bone_fx", base, "--adapter", adapter]
        command += ["-o", exported, "--dtype", "fp16", "--provider", "cuda", "--verify", "off"]
        return measure([*command, "-q"])

    def copy() -> Measured:
        shutil.rmtree(copied, ignore_errors=True)
        return measure(["sh", "-c", f"cp -r '{base}' '{copied}' && sync"])

    legs: dict[str, Callable[[], Measured]] = {"export": export, "cp": copy}
    runs = interleave(legs, arguments.rounds, console)
    wall = {name: [run.wall for run in found] for name, found in runs.items()}
    size = sum(f.stat().st_size for f in base.iterdir()) / 1e9
    common = {"layers": arguments.layers, "adapter": arguments.adapter, "input_gb": size}
    rows = [
        {
            **common,
            "what": f"bone-export, {folder_bytes(exported) / 1e9:.3g} GB",
            "wall_s": spread(wall["export"]),
            "of_cp": ratios(wall["export"], wall["cp"]),
            "peak_gb": max(run.peak for run in runs["export"]) / 1e9,
        },
        {**common, "what": "cp + sync", "wall_s": spread(wall["cp"])},
    ]
    report("export of a checkpoint of Llama-3-8B's shape", rows, COLUMNS, arguments.json)
    for folder in (exported, copied):
        shutil.rmtree(folder)


def shapes(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every weight, in the order of the files."""
    kv = HIDDEN // HEADS * KV_HEADS
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for i in range(layers):
        for name, outputs, inputs in linears(kv):
            yield f"model.layers.{i}.{name}.weight", (outputs, inputs)
        yield f"model.layers.{i}.input_layernorm.weight", (HIDDEN,)
        yield f"model.layers.{i}.post_attention_layernorm.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


def linears(kv: int) -> list[tuple[str, int, int]]:
    """Name, outputs and inputs of a layer's projections."""
    return [
        ("self_attn.q_proj", HIDDEN, HIDDEN),
        ("self_attn.k_proj", kv, HIDDEN),
        ("self_attn.v_proj", kv, HIDDEN),
        ("self_attn.o_proj", HIDDEN, HIDDEN),
        ("mlp.gate_proj", INNER, HIDDEN),
        ("mlp.up_proj", INNER, HIDDEN),
        ("mlp.down_proj", HIDDEN, INNER),
    ]


def write_base(folder: Path, layers: int) -> None:
    """Write configuration, shards and their index."""
    from transformers import LlamaConfig

    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        vocab_size=VOCABULARY,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(VOCABULARY * HIDDEN, generator=generator).mul_(0.02).bfloat16()
    shards: list[dict[str, torch.Tensor]] = [{}]
    filled = 0
    where: dict[str, int] = {}
    for name, shape in shapes(layers):
        count = torch.Size(shape).numel()
        if filled + 2 * count > SHARD_BYTES and shards[-1]:
            _save(folder, shards[-1], len(shards))
            shards[-1].clear()
            shards.append({})
            filled = 0
        # Numbers repeat from tensor to tensor: their values do not matter, their bytes are real.
        shards[-1][name] = noise[:count].view(shape).clone()
        where[name] = len(shards)
        filled += 2 * count
    _save(folder, shards[-1], len(shards))
    index = {
        "metadata": {},
        "weight_map": {name: _shard_name(number) for name, number in where.items()},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _save(folder: Path, shard: dict[str, torch.Tensor], number: int) -> None:
    save_file(shard, folder / _shard_name(number), metadata={"format": "pt"})


def _shard_name(number: int) -> str:
    return f"model-{number:05d}.safetensors"


def write_adapter(folder: Path, layers: int, kind: str) -> None:
    """Write a PEFT folder with a block of a kind on every projection."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, torch.Tensor] = {}

    def put(key: str, *shape: int) -> None:
        values = torch.randn(shape, generator=generator).mul_(1e-3).bfloat16()
        tensors[f"base_model.model.model.layers.{key}"] = values

    for i in range(layers):
        for name, outputs, inputs in linears(HIDDEN // HEADS * KV_HEADS):
            if kind == "bone":
                put(f"{i}.{name}.bone_block", R, outputs)
                continue
            put(f"{i}.{name}.lora_A.weight", LORA_R, inputs)
            put(f"{i}.{name}.lora_B.weight", outputs, LORA_R)
            if kind == "dora":
                put(f"{i}.{name}.lora_magnitude_vector", outputs)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    of_kind: dict[str, Any] = {"peft_type": "BONE", "r": R, "init_weights": True}
    if kind != "bone":
        of_kind = {"peft_type": "LORA", "r": LORA_R, "lora_alpha": R, "use_dora": kind == "dora"}
    config = {
        "task_type": "CAUSAL_LM",
        "target_modules": sorted({name.split(".")[-1] for name, *_ in linears(0)}),
        "bias": "none",
        "base_model_name_or_path": "synthetic",
        **of_kind,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))


if __name__ == "__main__":
    main()
