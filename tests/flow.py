"""Both flows of a text model as one sentence, each verb a stage.

    Flow(model, batch, folder).capture().insert("bone").step().fold().same().to_onnx().same()

A verb that fails names the stage and those before it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

import onnxruntime as ort
import pytest
import torch
from torch import Tensor

import bone_fx
import bone_fx.train.origin as capturing
from bone_fx.capture.training.capture_training import TrainingCapture
from tests.captures import capture_once
from tests.tolerances import assert_agrees

METHODS: dict[str, dict[str, Any]] = {
    "bone": {"r": 16, "init_weights": True},
    "bat": {"r": 8, "init_weights": "bat"},
    "mini": {"r": 14, "init_weights": "mini", "mini_r": 8},
}

P = ParamSpec("P")


def verb(
    run: Callable[Concatenate[Flow, P], None],
) -> Callable[Concatenate[Flow, P], Flow]:
    """A stage: it is noted, its failure names those before it, and the flow goes on."""

    @functools.wraps(run)
    def chained(flow: Flow, *args: P.args, **kwargs: P.kwargs) -> Flow:
        try:
            run(flow, *args, **kwargs)
        except Exception as error:
            error.add_note(f"in the stage {run.__name__!r}, after {flow.stages or 'none'}")
            raise
        flow.stages.append(run.__name__)
        return flow

    return chained


class Flow:
    """A model, what has become of it, and the logits that it must keep."""

    def __init__(self, model: Any, batch: dict[str, Tensor], folder: Path) -> None:
        self.model, self.batch, self.folder = model.eval(), batch, folder
        self.stages: list[str] = []
        self.captured: TrainingCapture | None = None
        self.adapted: bone_fx.AdaptedModule | None = None
        self.logits = self._logits(model)
        self._call: Callable[[], Tensor] = lambda: self._logits(self.model)

    def _logits(self, module: Any) -> Tensor:
        with torch.no_grad():
            logits: Tensor = module(**self.batch).logits
        return logits

    @verb
    def capture(self) -> None:
        """The model as a graph to train."""
        self.captured = captured = capture_once(self.model, self.batch)
        self._call = lambda: self._logits(captured)

    @verb
    def insert(self, method: str, targets: Any = "all-linear") -> None:
        """An adapter whose blocks are off zero."""
        config = bone_fx.BoneConfig(
            target_modules=targets, task_type="CAUSAL_LM", **METHODS[method]
        )
        with pytest.MonkeyPatch.context() as patch:
            if self.captured is not None:
                patch.setattr(capturing, "capture_training", lambda *_, **__: self.captured)
            self.adapted = adapted = bone_fx.adapt(self.model, config, self.batch)
        self._call = lambda: self._logits(adapted)

    @verb
    def step(self, rate: float = 0.05) -> None:
        """One step of AdamW: the logits must move."""
        assert self.adapted is not None, "nothing to train"
        optimizer = torch.optim.AdamW(self.adapted.parameter_groups(), lr=rate)
        self.adapted.train()(**self.batch, labels=self.batch["input_ids"]).loss.backward()
        optimizer.step()
        before, self.logits = self.logits, self._logits(self.adapted.eval())
        assert float((self.logits - before).abs().max()) > 1e-3, "the step moved nothing"

    @verb
    def fold(self) -> None:
        """The blocks become part of constant weights."""
        assert self.adapted is not None, "nothing to fold"
        folded = self.adapted.fold()
        self._call = lambda: self._logits(folded)

    @verb
    def to_onnx(self, **choices: Any) -> None:
        """The model's checkpoint and the adapter's folder, exported and run in ONNX Runtime."""
        base, adapter, out = (self.folder / name for name in ("base", "adapter", "out"))
        self.model.save_pretrained(base)
        if self.adapted is not None:
            self.adapted.save_pretrained(adapter)
        adapters = [] if self.adapted is None else [adapter]
        result = bone_fx.export(base, adapters=adapters, output=out, **choices)
        assert result.verified
        providers = ["CPUExecutionProvider"]
        session = ort.InferenceSession(str(out / "model.onnx"), providers=providers)
        feeds = {name: tensor.numpy() for name, tensor in self.batch.items()}
        for value in session.get_inputs():
            if value.name.startswith("past"):
                shape = (len(self.batch["input_ids"]), value.shape[1], 0, value.shape[3])
                feeds[value.name] = torch.zeros(shape).numpy()
        self._call = lambda: torch.from_numpy(session.run(["logits"], feeds)[0])

    @verb
    def same(self) -> None:
        """The logits are those of the model, or of the adapted one after its step."""
        assert_agrees(self._call(), self.logits, "folded logits")
