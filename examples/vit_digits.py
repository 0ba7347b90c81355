"""Read handwritten digits with a small ViT of random weights, of which blocks and ends train.

Needs scikit-learn, for its 1797 digits of 8 x 8. Run: python examples/vit_digits.py OUTPUT_FOLDER
"""

from __future__ import annotations

import sys

import torch
from sklearn.datasets import load_digits
from transformers import ViTConfig, ViTForImageClassification

import bone_fx


def main(output: str, epochs: int = 20) -> None:
    """Train on 1400 digits, count how many of the other 397 are read."""
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels))
    train, held = order[:1400], order[1400:]

    model = ViTForImageClassification(
        ViTConfig(
            image_size=8,
            patch_size=2,
            num_channels=1,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            hidden_dropout_prob=0.0,
            num_labels=10,
        )
    )
    config = bone_fx.BoneConfig(
        r=32, target_modules="all-linear", modules_to_save=["embeddings", "classifier"]
    )
    adapted = bone_fx.adapt(model, config, {"pixel_values": images[:4]}).train()
    adapted.print_trainable_parameters()
    optimizer = torch.optim.AdamW(adapted.parameter_groups(weight_decay=0.01), lr=3e-3)
    steps = epochs * (len(train) // 50)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for epoch in range(epochs):
        for rows in train[torch.randperm(len(train))].split(50):
            optimizer.zero_grad()
            loss = adapted(pixel_values=images[rows], labels=labels[rows]).loss
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch}: loss {loss.item():.4f}", flush=True)
    adapted.eval().save_pretrained(output)
    with torch.no_grad():
        right = adapted(pixel_values=images[held]).logits.argmax(-1) == labels[held]
    print(f"accuracy {right.float().mean().item():.3f} of {len(held)} digits")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1], *map(int, sys.argv[2:]))
