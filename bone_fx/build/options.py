"""What a person chooses about an export of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

import torch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class BuildOptions:
    """The choices of `bone_fx.export` that shape the graph.

    Attributes:
        dtype: Dtype of weights and activations, a key of `DTYPES`.
        provider: What the graph is written for, `cpu` or `cuda`.
        trust_remote_code: Run Python files that come with the base.
        revision: Branch, tag or commit of a hub id.
    """

    dtype: str = "fp32"
    provider: str = "cpu"
    trust_remote_code: bool = False
    revision: str | None = None
