"""SmolLM2-135M: train like PEFT, fold, export, generate in onnxruntime-genai what PyTorch
generates."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import bone_fx
from bone_fx.operators.loss.linear_cross_entropy import CHUNK
from tests.end_to_end.zen import zen_batch
from tests.tiers import slow

PARAMETERS = 134_515_008
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROMPTS = [
    "What is the capital of France? Answer in one sentence.",
    "Write a short poem about the sea.",
    "Explain what a compiler does.",
    "List three uses of a paper clip.",
    "Recite the Zen of Python.",
]
TOKENS = 40
METHODS: dict[str, dict[str, Any]] = {
    "bone": {"r": 32, "init_weights": True},
    "bat": {"r": 64, "init_weights": "bat"},
    "mini": {"r": 32, "init_weights": "mini", "mini_r": 16},
}


def export(*arguments: object) -> tuple[dict[str, Any], int]:
    """Run bone-export in a process of its own: its JSON and its peak resident memory in bytes."""
    code = (
        "import resource, subprocess, sys;"
        "p = subprocess.run([sys.executable, '-m', 'bone_fx', *sys.argv[1:]]);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr);"
        "sys.exit(p.returncode)"
    )
    command = [sys.executable, "-c", code, *map(str, arguments), "--json", "-q"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    content: dict[str, Any] = json.loads(done.stdout)
    return content, int(done.stderr.strip().splitlines()[-1]) * 1024


def prompts(folder: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for text in PROMPTS
    ]


def generate(folder: Path, prompt: list[int], *, stop: bool = False) -> list[int]:
    """Greedy tokens of onnxruntime-genai."""
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    parameters = og.GeneratorParams(model)
    length = len(prompt) + TOKENS
    parameters.set_search_options(
        max_length=length, min_length=0 if stop else length, do_sample=False
    )
    generator = og.Generator(model, parameters)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)[len(prompt) :]]


@pytest.mark.slow
def test_the_base_answers(smollm2: Path, tmp_path: Path) -> None:
    export(smollm2, "-o", tmp_path / "out", "--verify", "off")
    tokens = generate(tmp_path / "out", prompts(smollm2)[0], stop=True)
    text = AutoTokenizer.from_pretrained(smollm2).decode(tokens, skip_special_tokens=True)
    assert text.strip() == "The capital of France is Paris."


@pytest.mark.slow
def test_folded_export_generates_what_torch_generates(
    smollm2: Path, zen_adapter: Path, tmp_path: Path
) -> None:
    content, _ = export(smollm2, "--adapter", zen_adapter, "-o", tmp_path / "out")
    assert content["verified"] is True
    assert content["verification"]["figures"]["onnx_vs_unmerged"] <= 1e-4
    assert content["operators"]["com.microsoft::GroupQueryAttention"] == 30
    assert len(content["adapters"][0]["sites"]) == 210
    assert content["files"]["model.onnx.data"]["bytes"] <= 1.02 * PARAMETERS * 4
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    folded: Any = (
        bone_fx.adapt(model, zen_adapter, zen_batch(smollm2, 2, 9)).eval().merge_and_unload()
    )
    changed = False
    for prompt in prompts(smollm2):
        ids = torch.tensor([prompt])
        options = {
            "max_new_tokens": TOKENS,
            "min_new_tokens": TOKENS,
            "do_sample": False,
            "pad_token_id": 2,
        }
        expected = folded.generate(ids, attention_mask=torch.ones_like(ids), **options)
        base = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert generate(tmp_path / "out", prompt) == expected[0, len(prompt) :].tolist()
        changed |= not torch.equal(base, expected)
    assert changed


@pytest.mark.slow
def test_fp16_runs_and_holds_one_copy_of_the_weights(
    smollm2: Path, zen_adapter: Path, tmp_path: Path
) -> None:
    content, peak = export(
        smollm2,
        "--adapter",
        zen_adapter,
        "-o",
        tmp_path / "out",
        "--dtype",
        "fp16",
        "--verify",
        "off",
    )
    assert content["verified"] is False
    assert content["files"]["model.onnx.data"]["bytes"] <= 1.02 * PARAMETERS * 2
    assert peak < 1.0e9
    assert len(generate(tmp_path / "out", prompts(smollm2)[0])) == TOKENS


def trained(
    who: str, method: str, smollm2: Path, layers: int, steps: int
) -> tuple[list[float], dict[str, Any]]:
    """The losses of the first layers, and their blocks afterwards by the name of the layer."""
    model = AutoModelForCausalLM.from_pretrained(
        smollm2, dtype=torch.float32, num_hidden_layers=layers, use_cache=False
    )
    batches = [zen_batch(smollm2, 2, 16, start) for start in (0, 40, 80)]
    fields = {**METHODS[method], "target_modules": TARGETS}
    if who == "peft":
        config_class = peft.MissConfig if method == "mini" else peft.BoneConfig
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            net: Any = peft.get_peft_model(model, config_class(**fields))
    else:
        net = bone_fx.adapt(model, bone_fx.BoneConfig(**fields), batches[0])
    net.train()
    blocks = {layer(name): p for name, p in net.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(blocks.values(), lr=2e-4)
    losses = []
    for step in range(steps):
        loss = net(**batches[step % 3]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, blocks


def layer(name: str) -> str:
    """`0.self_attn.q_proj` of a block's name in PEFT or here."""
    match = re.search(r"layers[._](\d+)[._](\w+?)[._]([a-z]+_proj)", name)
    assert match is not None, name
    return ".".join(match.groups())


@pytest.mark.parametrize(
    ("method", "layers", "steps"),
    [("bone", 4, 6), *slow(("bat", 4, 6), ("mini", 4, 6), ("bat", 30, 20))],
)
def test_training_gives_the_losses_of_peft(
    method: str, layers: int, steps: int, smollm2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the loss taken from half of the logits at a time.

    AdamW turns a gradient of nearly zero into a whole step, so differences of rounding grow: PEFT
    against PEFT with each number of the base moved to a neighbour in float32 differs by 2e-5.
    """
    monkeypatch.setitem(CHUNK, "cpu", 16 * 49152)
    (theirs, their_blocks), (ours, blocks) = (
        trained(who, method, smollm2, layers, steps) for who in ("peft", "ours")
    )
    assert ours[-1] < ours[0]
    for step, (found, expected) in enumerate(zip(ours, theirs, strict=True)):
        assert abs(found - expected) <= (1e-5 if step else 1e-6) * max(1.0, expected)
    assert len(blocks) == 7 * layers
    assert blocks.keys() == their_blocks.keys()
    if method != "mini" and torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
        assert all(torch.equal(blocks[name], their_blocks[name]) for name in blocks)
