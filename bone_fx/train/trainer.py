"""`AdapterTrainer`: transformers' Trainer, whose checkpoints hold adapters and nothing else.

`transformers.Trainer` trains an `AdaptedModule` as it is. It writes the whole model, though, when
that is neither a `PreTrainedModel` nor a `PeftModel`: only how weights are written and read differs
here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from bone_fx.errors import UsageError
from bone_fx.train.adapted_module import AdaptedModule


class AdapterTrainer(Trainer):
    """A Trainer for an `AdaptedModule`.

    `save_steps` and `save_model` write what `AdaptedModule.save_pretrained` writes, and
    `resume_from_checkpoint` and `load_best_model_at_end` read it.

    Examples:
        >>> from transformers import TrainingArguments
        >>> arguments = TrainingArguments("runs", max_steps=100)  # doctest: +SKIP
        >>> trainer = AdapterTrainer(adapted, arguments, train_dataset=rows)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP

        Skipped as a doctest: it needs a model and accelerate; `examples/smollm2_trainer.py` runs.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.neftune_noise_alpha is not None:
            raise UsageError(
                "neftune_noise_alpha needs a model's embedding layer, and a graph has none",
                next_step="leave it out",
            )
        # Of a PEFT model, Trainer asks the base: a loss that counts no items is a mean of halves.
        self.model_accepts_loss_kwargs = self._adapted().accepts_loss_kwargs
        if self.args.label_names is None:
            self.label_names = list(self._adapted().label_names)

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        folder = Path(output_dir or self.args.output_dir or "trainer_output")
        self._adapted().save_pretrained(folder, is_main_process=self.args.should_save)
        if self.args.should_save:
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
            torch.save(self.args, folder / "training_args.bin")

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: torch.nn.Module | None = None
    ) -> None:
        self._adapted().restore(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.state.best_model_checkpoint is not None:
            self._adapted().restore(self.state.best_model_checkpoint)

    def _adapted(self) -> AdaptedModule:
        module: Any = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        assert isinstance(module, AdaptedModule)
        return module
