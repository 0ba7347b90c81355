"""SmolLM2-135M under a LoRA, an rsLoRA and a DoRA of PEFT: genai writes what PEFT writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.end_to_end.test_smollm2 import TOKENS, export, generate, prompts
from tests.end_to_end.zen import zen_batch

pytestmark = pytest.mark.slow

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"r": 8},
    "rslora": {"r": 16, "use_rslora": True},
    "dora": {"r": 8, "use_dora": True},
}
STEPS, RATE = 8, 3e-3


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing", "ignore:Could not find a config")
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_pefts(kind: str, smollm2: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], **KINDS[kind])
    model: Any = peft.get_peft_model(base, config)
    batch = zen_batch(smollm2, 2, 48)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "adapter")
    model.train(mode=False)
    content, _ = export(smollm2, "--adapter", tmp_path / "adapter", "-o", tmp_path / "out")
    assert content["verified"] is True
    changed = False
    for prompt in prompts(smollm2):
        ids = torch.tensor([prompt])
        options = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "max_new_tokens": TOKENS,
            "min_new_tokens": TOKENS,
            "do_sample": False,
            "pad_token_id": 2,
        }
        expected = model.generate(**options)[0, len(prompt) :].tolist()
        assert generate(tmp_path / "out", prompt) == expected
        if not changed:
            with model.disable_adapter():
                changed = model.generate(**options)[0, len(prompt) :].tolist() != expected
    assert changed
