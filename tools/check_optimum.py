"""optimum-onnx opens an exported decoder and generates what plain onnxruntime does with its graph.

Run: python tools/check_optimum.py build/optimum

optimum-onnx 0.1.0 takes transformers below 4.58, so it gets an environment of its own in the folder
(a minute or three, and 1.5 GB, most of it PyTorch); a second run uses it again. A tiny Llama with a
Bone adapter is exported in fp32, fp16 and int8, and `ORTModelForCausalLM.generate` is compared with
a greedy loop, token by token: one text, and two texts of one length. Exit status 0 means that all
are equal.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

PACKAGES = (
    *("optimum-onnx==0.1.0", "transformers==4.57.6", "onnxruntime==1.31.1"),
    *("torch==2.13.0", "numpy==2.4.6"),
)
DTYPES: tuple[Literal["fp32", "fp16", "int8"], ...] = ("fp32", "fp16", "int8")
PROMPTS = (((5, 9, 77, 31),), ((5, 9, 77), (64, 3, 21)))
"""Token ids by batch: rows of one length, since the graph takes no padding on the left."""
TOKENS = 8
END = 2


def main() -> int:
    """Make the environment, export, and compare inside of it; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="folder for the environment and the exports")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        return compare(arguments.folder)
    folder = arguments.folder.resolve()
    python = environment(folder / "venv")
    export(folder)
    hidden = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
    variables = {name: value for name, value in os.environ.items() if name not in hidden}
    command = [python, Path(__file__).resolve(), "--inside", folder]
    return subprocess.run(
        [*map(str, command)], env={**variables, "HF_HUB_OFFLINE": "1"}, check=False
    ).returncode


def environment(folder: Path) -> Path:
    """Python of an environment with optimum-onnx, which is made if it is not there."""
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        install = ("-m", "pip", "install", "--disable-pip-version-check", "--quiet", *PACKAGES)
        subprocess.run([str(python), *install], check=True)
        (folder / "ready").touch()
    return python


def export(folder: Path) -> None:
    """Export a tiny Llama with a Bone adapter in each dtype."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import bone_fx

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=64,
        initializer_range=0.2,
        eos_token_id=END,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "base")
    bone = bone_fx.BoneConfig(
        r=16, target_modules="all-linear", init_weights=False, task_type="CAUSAL_LM"
    )
    bone_fx.adapt(model, bone, model.dummy_inputs).save_pretrained(folder / "adapter")
    for dtype in DTYPES:
        bone_fx.export(
            folder / "base",
            adapters=[folder / "adapter"],
            output=folder / dtype,
            dtype=dtype,
            overwrite=True,
        )


def compare(folder: Path) -> int:
    """Compare both ways to generate, in the environment of optimum-onnx; the exit status."""
    import torch
    from optimum.onnxruntime import ORTModelForCausalLM

    differ = 0
    for dtype in DTYPES:
        model = ORTModelForCausalLM.from_pretrained(folder / dtype)
        assert model.config.eos_token_id == model.generation_config.eos_token_id == END
        for prompt in PROMPTS:
            ids = torch.tensor(prompt)
            mask = torch.ones_like(ids)
            found = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=TOKENS,
                min_new_tokens=TOKENS,
                do_sample=False,
            ).tolist()
            expected = greedy(folder / dtype / "model.onnx", ids.numpy())
            differ += found != expected
            print(f"{dtype}, {len(prompt)} rows: {'equal' if found == expected else 'DIFFERENT'}")
            print(f"  optimum     {found}\n  onnxruntime {expected}")
    return int(differ > 0)


def greedy(path: Path, ids: Any) -> list[list[int]]:
    """Tokens of a graph by plain onnxruntime, prompt included, without the end token."""
    import numpy as np
    import onnxruntime as ort

    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    caches = [value for value in session.get_inputs() if value.name.startswith("past_")]
    half = bool(caches) and caches[0].type == "tensor(float16)"
    empty = np.zeros((len(ids), caches[0].shape[1], 0, caches[0].shape[3]), "f2" if half else "f4")
    past = {value.name: empty for value in caches}
    outputs = [value.name for value in session.get_outputs()]
    tokens = new = ids
    for _ in range(TOKENS):
        feeds = {"input_ids": new, "attention_mask": np.ones_like(tokens), **past}
        found = dict(zip(outputs, session.run(outputs, feeds), strict=True))
        past = {name: found[name.replace("past_key_values", "present")] for name in past}
        logits = found["logits"][:, -1]
        logits[:, END] = -np.inf
        new = logits.argmax(-1)[:, None]
        tokens = np.concatenate([tokens, new], axis=1)
    return [[int(token) for token in row] for row in tokens]


if __name__ == "__main__":
    sys.exit(main())
