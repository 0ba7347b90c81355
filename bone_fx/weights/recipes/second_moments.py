"""Second moments of a product's inputs, as the squares of single inputs and the largest factors.

What an error `e` of a row costs is `E[(e · x)^2] = e M e^T` with `M = E[x x^T]`. A text of a
thousand tokens knows the diagonal of M well and the rest of it badly: there are more entries than
tokens. So M is estimated as its diagonal and its largest eigenvectors, these half of what was
measured, shrunk towards the diagonal as covariances of few samples are (Ledoit and Wolf 2004,
Schäfer and Strimmer 2005). With all that was measured errors are small on the text and larger on
others. It also takes R numbers an input instead of K.

Shape letters: T tokens, K inputs, R factors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FACTORS = 64
"""Largest number of factors."""
MEASURED = 0.5
"""Share of what was measured between different inputs that is taken for true."""
_ITERATIONS = 3


@dataclass(frozen=True)
class SecondMoments:
    """Second moments of inputs.

    Attributes:
        squares: Mean square of each input, float32 `[K]`.
        factors: Float32 `[K, R]`, such that `factors @ factors.T` is M between different inputs.
    """

    squares: Tensor
    factors: Tensor

    def __len__(self) -> int:
        """The number of inputs."""
        return len(self.squares)

    def is_finite(self) -> bool:
        """Whether no sum went beyond float32."""
        return bool(torch.isfinite(self.squares).all() and torch.isfinite(self.factors).all())

    def __add__(self, other: SecondMoments) -> SecondMoments:
        """The moments of a weight that two products read."""
        factors = torch.cat((self.factors, other.factors), 1)
        return SecondMoments(self.squares + other.squares, factors)


class InputSums:
    """Sums over the tokens that a product reads, in one call or in several."""

    def __init__(self, inputs: int) -> None:
        self.tokens = 0
        self._squares = torch.zeros(inputs, dtype=torch.float64)
        self._factors = torch.zeros(0, inputs)

    def add(self, x_TK: Tensor) -> None:
        """Count more tokens, of any float dtype."""
        rows = x_TK.float()
        self.tokens += len(rows)
        self._squares += rows.square().sum(0, dtype=torch.float64)
        self._factors = _largest(torch.cat((self._factors, rows)))

    def moments(self) -> SecondMoments:
        """What the sums come to."""
        factors = self._factors * (MEASURED / max(1, self.tokens)) ** 0.5
        return SecondMoments((self._squares / self.tokens).float(), factors.t().contiguous())


def _largest(rows_TK: Tensor) -> Tensor:
    """Rows `[R, K]`, at most `FACTORS`, with what the largest eigenvectors of `rows.T @ rows` hold.

    By subspace iteration from fixed numbers (Halko, Martinsson and Tropp 2011, algorithm 4.4).
    """
    tokens, inputs = rows_TK.shape
    if tokens <= FACTORS:
        return rows_TK
    fixed = torch.Generator().manual_seed(0)
    largest_KR = torch.randn(inputs, min(FACTORS, inputs), generator=fixed)
    for _ in range(_ITERATIONS):
        basis_TR = torch.linalg.qr(rows_TK @ largest_KR).Q
        largest_KR = rows_TK.t() @ basis_TR
    return largest_KR.t()
