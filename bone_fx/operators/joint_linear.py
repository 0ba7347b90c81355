"""Linear layers that read one input, each under one block, as one autograd function.

Kept for backward: the shard sums of x (one for all Bone sites of one R), and x itself only where a
BAT block or a base weight trains. No folded weight is kept, and no gradient of one is formed for
Bone. Terms are accumulated into the base product, and the gradients of x into one tensor.

Bone has two forms with the same result:

    on activations:  y = x Wᵀ + S(x) D      4·T·R·O operations more than the base, both directions
    on the weight:   y = x W'ᵀ              O·I numbers read and written, in each direction

The second is taken where `T·R / I` exceeds `FOLD_ABOVE` of the device (`bench_bone_form.py`), for
weights that have the block's dtype: a fold in a narrower one would round the block away.

Sums have PEFT 0.18.1's order, in float32 on a CPU. AdamW makes a whole step of a gradient that is
nearly zero, so two runs that differ in one bit have losses that differ in the third digit after
nine steps of 1e-3, and losses equal to PEFT's within 1e-5 over 20 steps need every bit.

Shapes: T tokens, I in_features, O out_features, R block size.
"""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from bone_fx.adapters import bat, bone
from bone_fx.operators.first_order import first_order
from bone_fx.operators.plain import cast, is_plain, on_plain_cpu

JOINED_METHODS = frozenset({"bone", "bat"})
"""The methods that are computed here."""

KEEP_SUMS = frozenset({"bone"})
"""Those that keep the shard sums of x at most, under a frozen weight."""

FOLD_ABOVE = {"cpu": 100.0, "cuda": 200.0}
"""`T·R / I` (tokens · block size / in_features) from which Bone's weight is folded, by device.

The forms cross where that is the rate of products in operations over the rate at which weights are
read and written: on a CPU of two cores in float32 at 25 to 45 (`tools/bench_bone_form.py`). A fold
rounds otherwise than PEFT, and below 100 it saves less than a tenth there. On an
H200 a fold saves a tenth in bfloat16 from about 150, and 3 % in float32; layers of a few hundred
features take as long as their kernels' launches in both."""


class Site(NamedTuple):
    """How one layer is computed.

    Attributes:
        method: `"bone"` or `"bat"`.
        dtype: Of Bone's term, and of the product with BAT's folded weight.
        recompute: Whether backward folds BAT's weight again, instead of keeping it.
    """

    method: str
    dtype: torch.dtype
    recompute: bool


class JointLinear(torch.autograd.Function):
    """`y_i = x W_i'ᵀ + b_i` for several layers of one x; second derivatives are refused."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sites: tuple[Site, ...], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        """`[..., O_i]` in `x`'s dtype.

        Args:
            ctx: Autograd's.
            x: `[..., I]`.
            sites: One a layer.
            *tensors: Weight `[O, I]`, bias `[O]` or None, and block of each layer, in turn.
        """
        x_TI = x.reshape(-1, x.shape[-1])
        x_in = _Casts(x_TI)
        ctx.set_materialize_grads(False)
        ctx.sites, ctx.shape = sites, x.shape
        needs = ctx.needs_input_grad[2:]
        sums: dict[int, Tensor] = {}
        kept: list[Tensor | None] = []
        outputs = []
        for site, (weight, bias, block) in zip(sites, _by_site(tensors), strict=True):
            assert weight is not None
            assert block is not None
            acting, on_weight = _acting(site, weight, block, x_TI)
            b_O = None if bias is None else cast(bias, acting.dtype)
            y_TO = functional.linear(x_in.to(acting.dtype), acting, b_O)
            if site.method == "bone":
                r = block.shape[0]
                if r not in sums:
                    sums[r] = bone.shard_sums(x_TI, r, site.dtype)
                if not on_weight:
                    y_TO = _accumulated(y_TO, sums[r], cast(block, site.dtype))
            kept.append(acting if site.method == "bat" and not site.recompute else None)
            # Not a view, or autograd would forbid an in-place operator after it.
            shape = [*x.shape[:-1], weight.shape[0]]
            outputs.append(torch.ops.aten._unsafe_view(cast(y_TO, x.dtype), shape))
        trains_weight = any(needs[0::3])
        trained = {site.method for n, site in zip(needs[2::3], sites, strict=True) if n}
        if "bone" not in trained:
            sums.clear()
        trains_bat = "bat" in trained
        ctx.rs = tuple(sums)
        ctx.save_for_backward(
            x_TI if trains_weight or trains_bat else None, *sums.values(), *kept, *tensors
        )
        return tuple(outputs)

    @staticmethod
    @first_order
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of x and of the weights, biases and blocks that are asked for."""
        x_TI, *saved = ctx.saved_tensors
        sums = dict(zip(ctx.rs, saved, strict=False))
        kept = saved[len(sums) : len(sums) + len(ctx.sites)]
        of_sites = list(_by_site(saved[len(sums) + len(ctx.sites) :]))
        needs = list(_by_site(ctx.needs_input_grad[2:]))
        x_in = None if x_TI is None else _Casts(x_TI)
        dx: Tensor | None = None
        site_grads: list[list[Tensor | None]] = [[None, None, None] for _ in of_sites]
        # From the last to the first, as autograd goes through layers of their own.
        for i, (weight, bias, block) in reversed(list(enumerate(of_sites))):
            site, dy = ctx.sites[i], gradients[i]
            if dy is None:
                continue
            dy_in = _Casts(dy.reshape(-1, dy.shape[-1]))
            w_OI = cast(weight, block.dtype) if site.method == "bat" else weight
            if ctx.needs_input_grad[0]:
                acting, on_weight = _acting(site, w_OI, block, dy_in.tensor, kept[i])
                dsum = None
                if site.method == "bone" and not on_weight:
                    dsum = dy_in.to(site.dtype) @ cast(block, site.dtype).t()
                dx = _plus_product(dx, dsum, dy_in.to(acting.dtype), acting, dy.dtype)
                del acting
            s_TR = sums.get(block.shape[0])
            site_grads[i] = _site_gradients(site, needs[i], x_in, dy_in, s_TR, w_OI, bias, block)
            dw = site_grads[i][0]
            site_grads[i][0] = None if dw is None else cast(dw, weight.dtype)
        if dx is not None:
            dx = dx.view(ctx.shape)
        return dx, None, *itertools.chain.from_iterable(site_grads)


def joint_linear(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    blocks: list[Tensor],
    methods: list[str],
    *,
    recompute: bool = True,
) -> list[Tensor]:
    """`JointLinear` under the rules of autocast.

    Under autocast products run in its dtype and folds in the block's; without, what a block takes
    part in runs in the block's dtype. The results have x's dtype in both cases, as in PEFT 0.18.1.
    """
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    compute = torch.get_autocast_dtype(device) if autocast else x.dtype
    sites = tuple(
        Site(method, compute if autocast else block.dtype, recompute)
        for method, block in zip(methods, blocks, strict=True)
    )
    tensors = [t for three in zip(weights, biases, blocks, strict=True) for t in three]
    with torch.autocast(device, enabled=False) if autocast else nullcontext():
        outputs = JointLinear.apply(cast(x, compute), sites, *tensors)  # type: ignore[no-untyped-call]
    return [cast(output, x.dtype) for output in outputs]


def _by_site(values: Any) -> Any:
    return zip(values[0::3], values[1::3], values[2::3], strict=True)


class _Casts:
    """A tensor in every dtype that is asked for; each cast is made once."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._by_dtype = {tensor.dtype: tensor}

    def to(self, dtype: torch.dtype) -> Tensor:
        """The tensor in a dtype."""
        if dtype not in self._by_dtype:
            self._by_dtype[dtype] = self.tensor.to(dtype)
        return self._by_dtype[dtype]


def _acting(
    site: Site, weight: Tensor, block: Tensor, rows: Tensor, kept: Tensor | None = None
) -> tuple[Tensor, bool]:
    """The weight that multiplies `rows`, in the product's dtype, and whether the block is in it.

    Traced, BAT's fold is a product and two sums, which a compiler fuses: for operators in place it
    would copy.
    """
    if kept is not None:
        return kept, True
    if site.method == "bat":
        w_OI = cast(weight, block.dtype)
        if not is_plain(weight):
            if site.recompute:
                block = _unshared(block)
            return cast(w_OI + bat.delta(w_OI, block), site.dtype), True
        return cast(bat.fold(w_OI, block), site.dtype), True
    same = weight.dtype == block.dtype == rows.dtype
    work = rows.shape[0] * block.shape[0] / weight.shape[1]
    if same and work > FOLD_ABOVE.get(weight.device.type, float("inf")):
        return bone.fold(weight, block if is_plain(weight) else _unshared(block)), True
    return cast(weight, rows.dtype), False


def _unshared(block: Tensor) -> Tensor:
    """A copy that a compiler takes for another tensor than any copy before.

    It merges equal expressions of a step, forward's and backward's folds too, and then keeps what
    was to be recomputed. It leaves alone what depends on an `aten.empty`, if the copy into that
    changes the shape (`torch._functorch.compile_utils.fx_graph_cse`, torch 2.13).
    """
    return block.new_empty((1, *block.shape)).copy_(block)[0]


def _plus_product(
    dx_TI: Tensor | None, dsum_TR: Tensor | None, dy_TO: Tensor, w_OI: Tensor, dtype: torch.dtype
) -> Tensor:
    """`(dx + spread(dS)) + dy W` in a dtype, in place if there is a dx."""
    if dx_TI is not None and dsum_TR is not None:
        bone.spread_sums_(dx_TI, dsum_TR)
    product_TI = cast(dy_TO @ w_OI, dtype)
    if dx_TI is not None:
        return dx_TI.add_(product_TI)
    return product_TI if dsum_TR is None else bone.spread_sums_(product_TI, dsum_TR)


def _accumulated(y_TO: Tensor, s_TR: Tensor, d_RO: Tensor) -> Tensor:
    """`y + S D` in place of `y`; the sum is rounded to `y`'s dtype once."""
    if y_TO.dtype == d_RO.dtype:
        return y_TO.addmm_(s_TR, d_RO)
    return y_TO.add_(s_TR @ d_RO)


def _site_gradients(
    site: Site,
    needs: tuple[bool, bool, bool],
    x_TI: _Casts | None,
    dy_TO: _Casts,
    s_TR: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    block: Tensor,
) -> list[Tensor | None]:
    """Gradients of a layer's weight, bias and block, from x, dy and the shard sums of x."""
    dw = dbias = dblock = None
    if needs[2] and site.method == "bone":
        assert s_TR is not None
        dblock = cast(s_TR.t() @ dy_TO.to(s_TR.dtype), block.dtype)
    if needs[0] or (needs[2] and site.method == "bat"):
        assert x_TI is not None
        dtype = site.dtype if site.method == "bat" else x_TI.tensor.dtype
        dw = dy_TO.to(dtype).t() @ x_TI.to(dtype)
        if site.method == "bat":
            dw = cast(dw, block.dtype)
            if needs[2]:
                in_turn = on_plain_cpu(weight, dw)
                dblock = bat.gradient(
                    cast(weight, block.dtype), dw, block.shape[-1], in_turn=in_turn
                )
            dw = bat.weight_gradient(dw, block) if needs[0] else None
    if bias is not None and needs[1]:
        dbias = dy_TO.tensor.sum(0).to(bias.dtype)
    return [dw, dbias, dblock]
