"""What each of two gloo processes does: trains a tiny Llama with transformers' Trainer under DDP.

Run as `torchrun --nproc-per-node 2 -m tests.distributed.trainer OUT`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import bone_fx
from tests.distributed.two_processes import leave
from tests.end_to_end.test_trainer import adapted_llama, arguments, losses, rows


def main(out: Path) -> None:
    settings = arguments(out, per_device_train_batch_size=4, save_strategy="steps", save_steps=3)
    trainer = bone_fx.AdapterTrainer(
        model=adapted_llama(), args=settings, train_dataset=rows(8), eval_dataset=rows(8)
    )
    trainer.train()
    note = {"processes": settings.world_size, "losses": losses(trainer)}
    note["evaluated"] = trainer.evaluate()["eval_loss"]
    (out / f"rank{settings.process_index}.json").write_text(json.dumps(note))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave()
