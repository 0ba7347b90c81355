"""Train a BAT adapter on SmolLM2 with transformers' Trainer; checkpoints hold the adapter only.

Run: python examples/smollm2_trainer.py BASE OUTPUT_FOLDER [STEPS]
"""

from __future__ import annotations

import codecs
import contextlib
import io
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

import bone_fx

with contextlib.redirect_stdout(io.StringIO()):
    import this


def main(base: str, output: str, steps: int = 20) -> None:
    """Teach the model the Zen of Python."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    ids = tokenizer(codecs.decode(this.s, "rot13"), return_tensors="pt")["input_ids"]
    length = 48
    rows = ids[0, : ids.shape[1] // length * length].view(-1, length)
    data = [{"input_ids": row, "labels": row} for row in rows]

    config = bone_fx.BoneConfig(
        r=16, target_modules=["q_proj", "v_proj"], init_weights="bat", task_type="CAUSAL_LM"
    )
    adapted = bone_fx.adapt(model, config, {"input_ids": rows[:2]}).train()
    settings = TrainingArguments(
        output_dir=output,
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        logging_steps=1,
        save_steps=max(1, steps // 2),
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = bone_fx.AdapterTrainer(
        model=adapted, args=settings, train_dataset=data[2:], eval_dataset=data[:2]
    )
    trainer.train()
    print(f"evaluation loss {trainer.evaluate()['eval_loss']:.4f}")
    trainer.save_model(output)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
