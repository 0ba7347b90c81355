"""Train a tiny model with a trainer of TRL, under PEFT or bone_fx: the import is all that differs.

Run: python examples/trl_trainers.py sft|packed|dpo|reward peft|bone_fx FOLDER

It needs TRL beside bone_fx. The last line is JSON: losses, a checkpoint's files, models loaded.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

STEPS = 10


def tokenizer() -> Any:
    """Words w0 to w61."""
    words = {**{f"w{i}": i for i in range(62)}, "</s>": 62, "<pad>": 63}
    made = Tokenizer(models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", pad_token="<pad>")


def main(kind: str, library: str, folder: Path) -> dict[str, Any]:
    """Train for ten steps; give losses, a checkpoint's files, and how many models were loaded."""
    import trl  # so that the usage is said without it
    from datasets import Dataset

    generator = torch.Generator().manual_seed(0)

    def text(words: int) -> str:
        ids = torch.randint(0, 60, (words,), generator=generator).tolist()
        return " ".join(f"w{i}" for i in ids)

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    config.pad_token_id, config.eos_token_id, config.num_labels = 63, 62, 1
    task = "SequenceClassification" if kind == "reward" else "CausalLM"
    model = getattr(transformers, f"LlamaFor{task}")(config)
    peft = importlib.import_module(library)
    adapter = peft.MissConfig(
        r=8,
        target_modules=["q_proj", "v_proj"],
        task_type="SEQ_CLS" if kind == "reward" else "CAUSAL_LM",
    )
    torch.manual_seed(1)
    model = peft.get_peft_model(model, adapter)
    loads: list[Any] = []
    from_pretrained = AutoModelForCausalLM.from_pretrained
    AutoModelForCausalLM.from_pretrained = lambda *a, **k: (
        loads.append(a) or from_pretrained(*a, **k)
    )
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": STEPS,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "seed": 0,
        "disable_tqdm": True,
    }
    if kind in ("sft", "packed"):
        rows = [{"text": text(12)} for _ in range(32)]
        if kind == "packed":
            options |= {"packing": True, "max_length": 24}
        name = "SFT"
    elif kind == "dpo":
        rows = [
            {"prompt": text(6), "chosen": f" {text(5)}", "rejected": f" {text(4)}"}
            for _ in range(32)
        ]
        name = "DPO"
    else:
        rows = [{"chosen": text(9), "rejected": text(8)} for _ in range(32)]
        name = "Reward"
    trainer = getattr(trl, f"{name}Trainer")(
        model,
        args=getattr(trl, f"{name}Config")(**options),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    files = sorted(path.name for path in (folder / f"checkpoint-{STEPS}").iterdir())
    return {"losses": losses, "files": files, "loads": len(loads)}


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    print(json.dumps(main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))))
