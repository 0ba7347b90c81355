"""`bone_fx::product`: a linear layer by the faster of the two libraries that PyTorch brings along.

PyTorch multiplies float32 on a CPU by MKL, which has its best kernels for Intel's CPUs. oneDNN,
which it brings along for other dtypes, is a tenth faster on AMD's (measured on an EPYC with AVX-512
at the shapes of SmolLM2: 212 against 188, 220 against 196 GFLOP/s), and adds to a tensor in the
same pass. On other machines, in other dtypes and in exports the products are PyTorch's own, and
everywhere under `torch.backends.mkldnn.flags(enabled=False)`. What `torch.compile` compiles calls
`bone_fx::times`, since inductor would choose MKL.

Its sums are longer, so a product's rounding error is 1.5 to 2 times MKL's (5e-7 against 2.6e-7 of
the result at 1536 inputs).

Shapes: T tokens, I in_features, O out_features.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bone_fx.operators.first_order import first_order
from bone_fx.operators.library import register, register_opaque
from bone_fx.operators.plain import on_plain_cpu

FROM = 8 << 20
"""`T·I·O` from which oneDNN is called: a call of it takes 10 to 25 microseconds more than MKL's."""

_ONEDNN: Any = torch.ops.mkldnn._linear_pointwise.default if torch._C._has_mkldnn else None
_ONEDNN_ADDED: Any = torch.ops.mkldnn._linear_pointwise.binary if torch._C._has_mkldnn else None


def times(
    x_TI: Tensor, w_OI: Tensor, bias: Tensor | None = None, *, added: Tensor | None = None
) -> Tensor:
    """`x Wᵀ + bias + added`, `[T, O]`, outside of autograd.

    Args:
        x_TI: `[T, I]`.
        w_OI: `[O, I]`, of any layout.
        bias: `[O]`.
        added: `[T, O]`; its memory may hold the result.
    """
    if _by_onednn(x_TI, w_OI):
        by = _TIMES if torch.compiler.is_compiling() else _times_by_onednn
        y_TO: Tensor = by(x_TI, w_OI, bias, added)
        return y_TO
    if added is None:
        return functional.linear(x_TI, w_OI, bias)
    if bias is not None:
        added = added.add_(bias)
    return added.addmm_(x_TI, w_OI.t())


def _times_by_onednn(
    x_TI: Tensor, w_OI: Tensor, bias: Tensor | None, added: Tensor | None
) -> Tensor:
    """`x Wᵀ + bias + added`, `[T, O]`, in float32; every argument stays as it is."""
    x_TI, w_OI = _dense(x_TI), _dense(w_OI)
    if added is None:
        y_TO: Tensor = _ONEDNN(x_TI, w_OI, bias, "none", [], "")
    else:
        y_TO = _ONEDNN_ADDED(x_TI, added, w_OI, bias, "add")
    return y_TO


_TIMES = register_opaque(
    "times(Tensor x, Tensor weight, Tensor? bias, Tensor? added) -> Tensor",
    _times_by_onednn,
    lambda x, weight, bias, added: x.new_empty(x.shape[0], weight.shape[0]),
)


class Product(torch.autograd.Function):
    """`y = x Wᵀ + b`, keeping what autograd's own keeps; second derivatives are refused."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`[..., O]`."""
        x_TI = x.reshape(-1, x.shape[-1])
        needs_x, needs_weight, _ = ctx.needs_input_grad
        ctx.shape = x.shape
        ctx.save_for_backward(x_TI if needs_weight else None, weight if needs_x else None)
        shape = [*x.shape[:-1], weight.shape[0]]
        # Not a view, or autograd would forbid an in-place operator after it.
        y: Tensor = torch.ops.aten._unsafe_view(times(x_TI, weight, bias), shape)
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, the weight and the bias, where they are asked for."""
        x_TI, weight = ctx.saved_tensors
        dy_TO = dy.reshape(-1, dy.shape[-1])
        dx = dw = dbias = None
        if weight is not None:
            dx = times(dy_TO, weight.t()).view(ctx.shape)
        if x_TI is not None:
            dw = dy_TO.t() @ x_TI
        if ctx.needs_input_grad[2]:
            dbias = dy_TO.sum(0)
        return dx, dw, dbias


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`torch.nn.functional.linear`, in float32 on an AMD CPU by oneDNN.

    Args:
        x: `[..., I]`.
        weight: `[O, I]`.
        bias: `[O]` or None.

    Returns:
        `[..., O]`.
    """
    if not _by_onednn(x, weight) or torch.is_autocast_enabled("cpu") or not x.numel():
        return functional.linear(x, weight, bias)
    y: Tensor = Product.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return y


PRODUCT = register("product(Tensor x, Tensor weight, Tensor? bias) -> Tensor", product)
"""The operator as it stands in graphs: `torch.ops.bone_fx.product.default`."""


def _dense(matrix: Tensor) -> Tensor:
    """The matrix without gaps, by rows or by columns.

    oneDNN takes every layout, but an expanded one, such as the gradient of a sum, by plain loops:
    fifty times slower.
    """
    rows, columns = matrix.shape
    dense = matrix.stride() in ((columns, 1), (1, rows))
    return matrix if dense else matrix.contiguous()


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN takes the product, and is the faster."""
    if not (x.dtype == weight.dtype == torch.float32 and _faster_here()):
        return False
    if torch.compiler.is_compiling():
        here = x.is_cpu and weight.is_cpu and not torch.compiler.is_exporting()
        return here and torch._C._get_mkldnn_enabled()
    if x.numel() * weight.shape[0] < FROM or not on_plain_cpu(x, weight):
        return False
    return torch._C._get_mkldnn_enabled()


@functools.cache
def _faster_here() -> bool:
    """Whether this is an AMD CPU under a PyTorch with MKL and oneDNN."""
    mkl: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    return mkl and torch._C._has_mkldnn and "AuthenticAMD" in _cpu()


def _cpu() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
