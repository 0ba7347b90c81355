"""Classify sentences with MiniLM: a Bone adapter and a new head, trained together.

The text is real and comes with Python: documentation of modules about numbers and about networks.
Run: python examples/minilm_sentences.py BASE OUTPUT_FOLDER [EPOCHS]
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import bone_fx

TOPICS = (
    ("statistics", "random", "fractions", "decimal", "math", "cmath", "numbers"),
    ("socket", "http.client", "urllib.request", "smtplib", "imaplib", "email.message", "ssl"),
)


def sentences(names: tuple[str, ...]) -> list[str]:
    """Sentences from the documentation of some modules and what is in them."""
    found: dict[str, None] = {}
    for name in names:
        module = importlib.import_module(name)
        inside = [value for value in vars(module).values() if callable(value)]
        for value in (module, *inside):
            for sentence in re.split(r"(?<=\.)\s+", inspect.getdoc(value) or ""):
                words = " ".join(sentence.split())
                if 30 < len(words) < 160 and ">>>" not in words:
                    found[words] = None
    return list(found)


def main(base: str, output: str, epochs: int = 3) -> None:
    """Train on most sentences, and count how many of the others are told apart."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    data = [(text, y) for y, names in enumerate(TOPICS) for text in sentences(names)[:120]]
    order = torch.randperm(len(data)).tolist()
    held, train = [data[i] for i in order[:48]], [data[i] for i in order[48:]]

    def batch(rows: list[tuple[str, int]]) -> dict[str, torch.Tensor]:
        texts, labels = zip(*rows, strict=True)
        words = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        return {**words, "labels": torch.tensor(labels)}

    config = bone_fx.BoneConfig(
        r=32, target_modules=["query", "value"], modules_to_save=["classifier"], task_type="SEQ_CLS"
    )
    adapted = bone_fx.adapt(model, config, batch(train[:4])).train()
    optimizer = torch.optim.AdamW(adapted.parameter_groups(weight_decay=0.01), lr=2e-3)
    for epoch in range(epochs):
        for start in range(0, len(train), 16):
            optimizer.zero_grad()
            loss = adapted(**batch(train[start : start + 16])).loss
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch}: loss {loss.item():.4f}", flush=True)
    adapted.eval().save_pretrained(output)
    with torch.no_grad():
        given = batch(held)
        right = adapted(**given).logits.argmax(-1) == given["labels"]
    print(f"accuracy {right.float().mean().item():.3f} of {len(held)} sentences")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
