"""What a person chooses about an export of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from bone_fx.onnx.quantize import Quantization
from bone_fx.weights.recipes.nbits import Scheme

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
BITS = {"int4": 4, "int8": 8}


@dataclass(frozen=True)
class BuildOptions:
    """The choices of `bone_fx.export` that shape the graph.

    Attributes:
        dtype: A key of `DTYPES`, the dtype of weights and activations; or of `BITS`, for products
            with quantized weights and activations in fp32 on the CPU, fp16 on CUDA.
        provider: What the graph is written for, `cpu` or `cuda`.
        trust_remote_code: Run Python files that come with the base.
        revision: Branch, tag or commit of a hub id.
        block_size: Values of a quantized weight that share a scale.
        symmetric: Quantize without zero points.
        head: `keep`, `int4` or `int8` for the head of a quantized decoder.
        embeddings: `keep`, `int4` or `int8`; None keeps them unless they are tied to a quantized
            head, which then serves both.
        last_token_logits: Give a decoder's logits of each text's last token only.
        calibration: Text file that shows a decoder's inputs to a quantization to 4 bits, `none`, or
            None for the built-in text.
        rounded: Round every weight to this dtype on its way to `dtype`: a twin of a graph in that
            dtype, of the same operators, to verify it where there are no kernels for it.
    """

    dtype: str = "fp32"
    provider: str = "cpu"
    trust_remote_code: bool = False
    revision: str | None = None
    block_size: int = 16
    symmetric: bool = False
    head: str = "int8"
    embeddings: str | None = None
    last_token_logits: bool = False
    calibration: str | Path | None = None
    rounded: torch.dtype | None = None

    @property
    def activations(self) -> str:
        """Dtype of activations, cache and logits."""
        if self.dtype in BITS:
            return "fp16" if self.provider == "cuda" else "fp32"
        return self.dtype

    @property
    def quantization(self) -> Quantization | None:
        """What is quantized; None for a float export."""
        if self.dtype not in BITS:
            return None
        scale = DTYPES[self.activations]

        def scheme(name: str | None) -> Scheme | None:
            if name not in BITS:
                return None
            return Scheme(BITS[name], self.block_size, self.symmetric, scale_dtype=scale)

        weights = scheme(self.dtype)
        assert weights is not None
        return Quantization(
            weights,
            scheme(self.head),
            scheme(self.embeddings),
            follow_head=self.embeddings is None,
            accuracy_level=4 if self.provider == "cpu" else 0,
        )
