"""Train a Bone adapter on SmolLM2 in a plain loop, activations recomputed in backward.

Run: python examples/smollm2_loop.py BASE OUTPUT_FOLDER [STEPS]
"""

from __future__ import annotations

import codecs
import contextlib
import io
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import bone_fx

with contextlib.redirect_stdout(io.StringIO()):
    import this


def main(base: str, output: str, steps: int = 20) -> None:
    """Teach the model the Zen of Python."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    ids = tokenizer(codecs.decode(this.s, "rot13"), return_tensors="pt")["input_ids"]
    length = 48
    rows = ids[0, : ids.shape[1] // length * length].view(-1, length)
    batches = [{"input_ids": part, "labels": part} for part in rows.split(2)]

    config = bone_fx.BoneConfig(r=32, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = bone_fx.adapt(model, config, batches[0], gradient_checkpointing=True).train()
    adapted.print_trainable_parameters()
    optimizer = torch.optim.AdamW(adapted.parameter_groups(weight_decay=0.01), lr=3e-4)
    for step in range(steps):
        optimizer.zero_grad()
        loss = adapted(**batches[step % len(batches)]).loss
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item():.4f}", flush=True)
    adapted.save_pretrained(output)
    merged = adapted.eval().merge_and_unload()
    prompt = tokenizer("Beautiful is better than", return_tensors="pt")
    print(tokenizer.decode(merged.generate(**prompt, max_new_tokens=8, do_sample=False)[0]))


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
