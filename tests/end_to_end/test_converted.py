"""Converted adapters in the tools that they are converted for: PEFT 0.21.2, genai's builder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from transformers import AutoModelForCausalLM

import bone_fx
from tests.end_to_end.tiny import tiny_adapter, tiny_base, tiny_tokenizer

pytestmark = pytest.mark.slow

IDS = [[5, 17, 33, 90, 2, 61, 7]]
PROGRAM = """
import json, sys
import peft, torch
from transformers import AutoModelForCausalLM
base, ids, *folders = sys.argv[1:]
assert peft.__version__ == "0.21.2", peft.__version__
for folder in folders:
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    with torch.no_grad():
        print(json.dumps(model(input_ids=torch.tensor(json.loads(ids))).logits.tolist()))
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer(tiny_base(tmp_path_factory.mktemp("converted") / "base"))


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    return tiny_adapter(base.parent / "adapter")


@pytest.fixture(scope="module")
def expected(base: Path, adapter: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base)
    adapted = bone_fx.AdaptedModule.from_pretrained(model, adapter)
    with torch.no_grad():
        logits: torch.Tensor = adapted(input_ids=torch.tensor(IDS)).logits
    return logits


def test_the_next_peft_computes_the_same(
    base: Path, adapter: Path, expected: torch.Tensor, tmp_path: Path
) -> None:
    library = tmp_path / "peft"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", library]
    subprocess.run([*pip, "peft==0.21.2"], check=True)
    for kind in ("lora", "miss"):
        bone_fx.convert_adapter(adapter, to=kind, base=base, output=tmp_path / kind)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            PROGRAM,
            base,
            json.dumps(IDS),
            tmp_path / "lora",
            tmp_path / "miss",
        ],
        env={**os.environ, "PYTHONPATH": str(library)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    largest = float(expected.abs().max())
    for line in done.stdout.splitlines():
        logits = torch.tensor(json.loads(line))
        assert float((logits - expected).abs().max()) <= 1e-5 * max(1.0, largest)


def test_the_builder_of_genai_takes_it_for_a_lora(
    base: Path, adapter: Path, expected: torch.Tensor, tmp_path: Path
) -> None:
    bone_fx.convert_adapter(adapter, to="lora", base=base, output=tmp_path / "lora")
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", base]
    command += ["-o", tmp_path / "out", "-p", "fp32", "-e", "cpu", "-c", tmp_path / "cache"]
    command += ["--extra_options", f"adapter_path={tmp_path / 'lora'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    session = ort.InferenceSession(tmp_path / "out" / "model.onnx")
    ids = np.array(IDS, np.int64)
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    for given in session.get_inputs():
        if given.name.startswith("past_key_values"):
            feeds[given.name] = np.zeros((1, 3, 0, 16), np.float32)
    (logits,) = session.run(["logits"], feeds)
    largest = float(expected.abs().max())
    assert np.abs(logits - expected.numpy()).max() <= 1e-4 * max(1.0, largest)
