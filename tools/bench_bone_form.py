"""Bone's two forms, forward and backward of one layer: on the activations and on the weight.

    on activations:  y = x Wᵀ + S(x) D
    on the weight:   y = x W'ᵀ, W' folded in each direction

`bone_fx.operators.joint_linear` takes the second where T·R / I exceeds `FOLD_ABOVE` of the device.
The table shows the time of the second form over that of the first by T·R / I; the constant
belongs where the second is clearly faster.

    python tools/bench_bone_form.py
    python tools/bench_bone_form.py --device cuda --dtype bf16 --shapes 4096x4096 4096x14336
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from benching import interleave, ratios, report, spread
from rich.console import Console

from bone_fx.operators import joint_linear as operator

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COLUMNS = {
    "layer": "I x O",
    "tokens": "T",
    "r": "R",
    "size": "T·R / I",
    "activations_ms": "on activations, ms",
    "weight_ms": "on the weight, ms",
    "ratio": "weight / activations",
}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=["576x1536", "1536x576", "2048x2048"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[128, 512, 2048])
    parser.add_argument("-r", nargs="+", type=int, default=[16, 64])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of weight and block")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="append the rows to this file")
    arguments = parser.parse_args()
    rows = []
    for shape in arguments.shapes:
        in_features, out_features = map(int, shape.split("x"))
        for tokens in arguments.tokens:
            for r in arguments.r:
                x = torch.randn(tokens, in_features)
                weight = torch.randn(out_features, in_features) / in_features**0.5
                block = torch.randn(r, out_features) * 1e-3
                tensors = [
                    t.to(arguments.device, DTYPES[arguments.dtype]) for t in (x, weight, block)
                ]
                legs = {
                    "activations": _leg(tensors, float("inf")),
                    "weight": _leg(tensors, 0.0),
                }
                for leg in legs.values():
                    leg()
                found = interleave(legs, arguments.rounds, Console(quiet=True))
                rows.append(
                    {
                        "layer": shape,
                        "tokens": tokens,
                        "r": r,
                        "size": tokens * r / in_features,
                        "activations_ms": spread(found["activations"]),
                        "weight_ms": spread(found["weight"]),
                        "ratio": ratios(found["weight"], found["activations"]),
                    }
                )
    rows.sort(key=lambda row: row["size"])
    report("Bone's forms", rows, COLUMNS, arguments.json)


def _leg(tensors: list[torch.Tensor], fold_above: float) -> Callable[[], float]:
    x, weight, block = tensors
    x, block = x.clone().requires_grad_(), block.clone().requires_grad_()
    device = x.device.type

    def run() -> float:
        chosen = operator.FOLD_ABOVE.get(device)
        operator.FOLD_ABOVE[device] = fold_above
        try:
            start = time.perf_counter()
            y = operator.joint_linear(x, [weight], [None], [block], ["bone"])[0]
            y.sum().backward()  # type: ignore[no-untyped-call]
            if device == "cuda":
                torch.cuda.synchronize()
            return (time.perf_counter() - start) * 1e3
        finally:
            x.grad = block.grad = None
            if chosen is not None:
                operator.FOLD_ABOVE[device] = chosen

    return run


if __name__ == "__main__":
    main()
