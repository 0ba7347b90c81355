"""What verification allows a folded weight: what float32 rounds, and nothing that is wrong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bone_fx.adapters import METHODS, Block, LowRank
from bone_fx.verify.fold_bounds import fold_bounds, lies_within

OUT, IN, R = 96, 640, 24


def _draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _steps(chain: str) -> list[tuple[str, Block]]:
    lengths = _draw(OUT).abs()
    blocks: dict[str, Block] = {
        "lora": LowRank(_draw(R, IN), _draw(OUT, R), 0.5),
        "dora": LowRank(_draw(R, IN), _draw(OUT, R), 0.5, lengths),
        "bat": 0.1 * _draw(OUT // 8, 8, 8),
        "bone": _draw(16, OUT),
    }
    return [(name, blocks[name]) for name in chain.split()]


def _exactly(weight: Tensor, steps: list[tuple[str, Block]]) -> Tensor:
    folded = weight.double()
    for method, block in steps:
        folded = METHODS[method].fold(folded, block.to(torch.float64))
    return folded


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("chain", ["lora", "dora", "bone dora lora", "bat lora", "lora bat dora"])
def test_the_exact_fold_lies_within_and_a_wrong_one_does_not(
    chain: str, dtype: torch.dtype
) -> None:
    weight, steps = _draw(OUT, IN), _steps(chain)
    low, high = fold_bounds(weight, steps, transposed=False, layer="up")
    exact = _exactly(weight, steps)
    assert lies_within(exact.float().to(dtype), low, high)
    for rows in (1, 7, 32):  # in parts, whose products are summed in other orders
        parts = [
            METHODS[steps[0][0]].fold(w, METHODS[steps[0][0]].part(steps[0][1], at, (0, IN)))
            for at, w in _cut(weight, rows if chain[:3] != "bat" else 8)
        ]
        if len(steps) == 1:
            assert lies_within(torch.cat(parts).to(dtype), low, high)
    wrong = exact * (1 + 2 * torch.finfo(dtype).eps + 1e-4)
    assert not lies_within(wrong.float().to(dtype), low, high)
    assert float(((high - low) / exact.abs().clamp_min(1)).max()) < 1e-3


def _cut(weight: Tensor, rows: int) -> list[tuple[tuple[int, int], Tensor]]:
    starts = range(0, OUT, rows)
    return [((start, min(OUT, start + rows)), weight[start : start + rows]) for start in starts]


def test_one_tensor_where_it_is_exact() -> None:
    low, high = fold_bounds(_draw(OUT, IN), _steps("bone bat"), transposed=False, layer="up")
    assert low is high


def test_of_a_transposed_weight() -> None:
    weight, steps = _draw(OUT, IN), _steps("dora")
    low, high = fold_bounds(weight.t().contiguous(), steps, transposed=True, layer="up")
    assert lies_within(_exactly(weight, steps).float().t(), low, high)
