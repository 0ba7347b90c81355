"""Quantized blocks: the bytes of ONNX Runtime's own quantizer, and what the search gains."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from onnxruntime.capi import _pybind_state as ort
from torch import Tensor

from bone_fx.weights.recipes.fold_recipe import Fold, FoldStep
from bone_fx.weights.recipes.nbits import Scheme, pack, quantize, unpack
from bone_fx.weights.recipes.quantized import QuantizedWeight, rows_in_float32
from bone_fx.weights.recipes.recipe import Cast, Transpose, Value

N, K = 24, 128
ORT_QUANTIZERS = {4: ort.quantize_matmul_4bits, 8: ort.quantize_matmul_8bits}


def weight() -> Tensor:
    """Rows of both signs, of one sign, and of zeros."""
    w = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
    w[0], w[1], w[2] = 0.0, w[1].abs(), -w[2].abs()
    return w


@pytest.mark.parametrize(
    ("bits", "size", "symmetric"), list(product((4, 8), (16, 32, 128), (True, False)))
)
def test_bytes_of_onnxruntimes_quantizer(bits: int, size: int, symmetric: bool) -> None:
    blocks = quantize(weight(), Scheme(bits, size, symmetric))
    groups = K // size
    packed = np.zeros((N, groups, size * bits // 8), np.uint8)
    zeros = np.zeros((N, -(-groups * bits // 8)), np.uint8)
    scales = np.zeros((N, groups), np.float32)
    stored = np.ascontiguousarray(weight().t().numpy())
    ORT_QUANTIZERS[bits](packed, stored, scales, zeros, size, N, K, symmetric)
    assert np.array_equal(pack(blocks.codes, bits).numpy(), packed)
    assert np.array_equal(blocks.scales.numpy(), scales)
    if symmetric:
        assert bool((blocks.zeros == 1 << (bits - 1)).all())
    else:
        assert np.array_equal(pack(blocks.zeros, bits).numpy(), zeros)


@pytest.mark.parametrize("symmetric", [True, False])
def test_search_never_loses_to_the_full_range(symmetric: bool) -> None:
    w, scheme = weight(), Scheme(4, 32, symmetric)
    plain, searched = (
        (blocks.values() - w).view(N, -1, 32).norm(dim=-1)
        for blocks in (quantize(w, scheme), quantize(w, scheme, torch.ones(K)))
    )
    assert bool((searched <= plain * 1.000001).all())
    assert float(searched.norm()) < 0.98 * float(plain.norm())


def test_codes_are_chosen_for_the_rounded_scale() -> None:
    w = weight()
    blocks = quantize(w, Scheme(8, 32, scale_dtype=torch.float16))
    assert blocks.scales.dtype == torch.float16
    assert float((blocks.values() - w).norm() / w.norm()) < 0.006


@pytest.mark.parametrize("length", [6, 7])
def test_packing_is_undone(length: int) -> None:
    codes = torch.arange(3 * length, dtype=torch.uint8).view(3, length) % 16
    assert pack(codes, 4).shape == (3, -(-length // 2))
    assert torch.equal(unpack(pack(codes, 4), 4, length), codes)


def test_recipes_give_the_parts_of_the_fold_in_float32() -> None:
    base = Value(weight().half())
    block = 0.1 * torch.randn(16, N, generator=torch.Generator().manual_seed(1))
    fold = Fold(base, (FoldStep("bone", block, "a"),), False, torch.float16, "layer")
    stored = Transpose(Cast(fold, torch.float32))
    source = rows_in_float32(stored, transposed=True)
    unrounded = source.evaluate()
    assert unrounded.dtype == torch.float32
    assert not torch.equal(unrounded, fold.evaluate().float())
    quantized = QuantizedWeight(source, Scheme(4, 32))
    parts = {name: quantized.part(name) for name in ("codes", "scales", "zero_points")}
    expected = quantize(unrounded, Scheme(4, 32))
    found = {name: part.evaluate() for name, part in parts.items()}
    assert all(found[n].shape == p.shape and found[n].dtype == p.dtype for n, p in parts.items())
    assert torch.equal(found["codes"], pack(expected.codes, 4))
    assert torch.equal(found["scales"], expected.scales)
    assert torch.equal(found["zero_points"], pack(expected.zeros, 4))
    assert torch.equal(parts["scales"].evaluate(), expected.scales)  # again, from the start


def importance() -> Tensor:
    """Inputs of very different sizes, some of them never seen."""
    counts = torch.randn(K, generator=torch.Generator().manual_seed(2)).mul(2).exp()
    counts[5], counts[32:64] = 0.0, 0.0
    return counts


@pytest.mark.parametrize("symmetric", [True, False])
def test_importance_never_costs_weighted_error(symmetric: bool) -> None:
    w, scheme = weight(), Scheme(4, 32, symmetric)

    def errors(*counts: Tensor) -> Tensor:
        squares = (quantize(w, scheme, *counts).values() - w).square() * importance()
        return squares.view(N, -1, 32).sum(-1)

    plain, weighted = errors(), errors(importance())
    assert float(weighted.sum()) < 0.9 * float(plain.sum())
    assert bool((weighted <= plain * 1.000001).all())


def test_importance_has_no_unit() -> None:
    w, scheme = weight(), Scheme(4, 16)
    one, other = (quantize(w, scheme, importance() * unit) for unit in (1.0, 2.0**-40))
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.scales, other.scales)


def test_codes_are_nearest_with_importance() -> None:
    """Verification asks for that: importance moves scales and zero points, not single codes."""
    w = weight()
    blocks = quantize(w, Scheme(4, 16), importance())
    scales = blocks.scales.unsqueeze(-1)
    places = w.view(N, -1, 16) * torch.where(scales == 0, 0.0, 1 / scales)
    places = (places + blocks.zeros.unsqueeze(-1).float()).clamp(0, 15)
    assert float((places - blocks.codes.float()).abs().max()) <= 0.501
