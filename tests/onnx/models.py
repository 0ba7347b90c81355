"""Small modules of many forms, and running what was written for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bone_fx.onnx.writer import DATA_FILE, MODEL_FILE, WrittenModel, write_model


class Net(nn.Module):
    """Linear layers square, narrow, without bias and shared; Conv1D; F.linear; dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(50, 80), nn.Linear(80, 50, bias=False)
        self.shared, self.head = nn.Linear(50, 50), nn.Linear(32, 7)
        self.conv = Conv1D(48, 50)
        self.free = nn.Parameter(torch.randn(32, 48) * 0.1)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(torch.relu(self.up(x)))
        x = self.dropout(self.shared(torch.tanh(self.shared(x))))
        return self.head(nn.functional.linear(torch.relu(self.conv(x)), self.free))


class Tied(nn.Module):
    """An embedding whose weight is the head's."""

    def __init__(self, rows: int = 500, width: int = 32) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(rows, width), nn.Linear(width, rows, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(ids)))


def write_and_run(model: ir.Model, folder: Path, feeds: dict[str, Tensor]) -> list[Tensor]:
    """Outputs of ONNX Runtime for a model written to `folder`."""
    write_model(model, folder)
    return run(folder, feeds)


def run(folder: Path, feeds: dict[str, Tensor]) -> list[Tensor]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        str(folder / MODEL_FILE), options, providers=["CPUExecutionProvider"]
    )
    outputs: list[Any] = session.run(None, {name: t.numpy() for name, t in feeds.items()})
    return [torch.from_numpy(np.asarray(output)) for output in outputs]


def content(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in (MODEL_FILE, DATA_FILE)}


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def sizes(written: WrittenModel) -> dict[str, int]:
    return {file.name: file.bytes for file in written.files}
