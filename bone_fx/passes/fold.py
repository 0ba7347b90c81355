"""Fold: turn block-adaptation nodes into plain linear layers with constant weights.

Before:  %y = bone_fx.adapted_linear(%x, %q_proj_weight, %bias, [%block], ['bone'], [], False)
After:   %y = aten.linear(%x, %q_proj_weight', %bias)      with W' folded in float32 and rounded
once

The folded weight takes the base weight's name, so that the result's `state_dict()` has the base's
names and no others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from bone_fx.adapters import METHODS, Block
from bone_fx.dialects import LinearUse, read_use
from bone_fx.dialects.adapted_calls import AdaptedArguments
from bone_fx.errors import FoldError
from bone_fx.graphs import container
from bone_fx.operators import ADAPTED_LINEAR
from bone_fx.passes.frame import Outcome, on_a_copy
from bone_fx.passes.insert import BLOCK, DROPOUT
from bone_fx.sites import LinearSite


def fold_weight(
    weight: Tensor,
    steps: Sequence[tuple[str, Block]],
    *,
    transposed: bool = False,
    layer: str = "weight",
) -> Tensor:
    """Fold a list of blocks into one weight.

    Args:
        weight: `[O, I]`, or `[I, O]` if `transposed`.
        steps: `(method, block)` in the order in which the adapters apply.
        transposed: Whether the weight is stored `[I, O]`.
        layer: The layer's name for messages.

    Returns:
        A new tensor of the weight's shape and dtype: computed in float32 (float64 for a float64
        weight), rounded once.

    Raises:
        FoldError: The result holds NaN or Inf.
    """
    compute = torch.float64 if weight.dtype == torch.float64 else torch.float32
    folded = (weight.t() if transposed else weight).to(compute)
    for method, block in steps:
        folded = METHODS[method].fold(folded, block.to(folded.device, compute))
    folded = (folded.t() if transposed else folded).to(weight.dtype).contiguous()
    # A sum takes a twentieth of the time; only if it is not finite, which huge values can do, ask.
    total = folded.sum(dtype=compute)
    if not bool(torch.isfinite(total)) and not bool(torch.isfinite(folded).all()):
        raise FoldError(
            f"{layer}: the folded weight holds NaN or Inf",
            expected=f"finite values that {weight.dtype} can hold",
            next_step="check the adapter's block of this layer, or fold into a wider dtype",
        )
    return folded


@on_a_copy
def fold_adapters(gm: fx.GraphModule) -> Outcome:
    """Fold every block-adaptation node of a graph, which is left as it was.

    Returns:
        A plain graph without our nodes; `applied` lists the folded sites.

    Raises:
        FoldError: A folded weight holds NaN or Inf; the message names the layer.

    Examples:
        >>> import bone_fx
        >>> net = nn.Sequential(nn.Linear(48, 80), nn.ReLU(), nn.Linear(80, 7))
        >>> config = bone_fx.BoneConfig(r=16, target_modules=["0"], init_weights=False)
        >>> adapted = bone_fx.insert_adapters(fx.symbolic_trace(net), config).graph_module
        >>> folded = bone_fx.fold_adapters(adapted).graph_module
        >>> list(folded.state_dict()) == list(net.state_dict())
        True
        >>> x = torch.randn(3, 48)
        >>> torch.allclose(folded(x), adapted(x), atol=1e-5)
        True
    """
    adapted = [node for node in gm.graph.nodes if node.target is ADAPTED_LINEAR]
    if not adapted:
        return Outcome(modified=False)
    sites: dict[str, LinearSite] = {}
    for node in adapted:
        use = read_use(gm, node)
        if use is None:
            continue
        if use.site.name not in sites:
            _fold_site(gm, use)
            sites[use.site.name] = use.site
        _restore(gm.graph, use)
    gm.graph.eliminate_dead_code(is_impure_node=_is_input)
    _drop_blocks(gm)
    return Outcome(modified=True, applied=tuple(sites.values()))


def _fold_site(gm: fx.GraphModule, use: LinearUse) -> None:
    arguments = AdaptedArguments.of(use.node)
    blocks = [gm.get_parameter(str(block.target)).detach() for block in arguments.blocks]
    steps = list(zip(arguments.methods, blocks, strict=True))
    weight = gm.get_parameter(use.site.weight_name)
    with torch.no_grad():
        folded = fold_weight(
            weight.detach(), steps, transposed=use.site.transposed, layer=use.site.name
        )
    owner, leaf = container(gm, use.site.weight_name)
    owner.register_parameter(leaf, nn.Parameter(folded, requires_grad=weight.requires_grad))


def _restore(graph: fx.Graph, use: LinearUse) -> None:
    node, site = use.node, use.site
    weight, bias = AdaptedArguments.of(node).weight, use.bias
    target: Callable[..., object] = (
        functional.linear if use.family == "functional" else torch.ops.aten.linear.default
    )
    with graph.inserting_before(node):
        if site.transposed:
            flip = torch.t if use.family == "functional" else torch.ops.aten.t.default
            value = weight.meta.get("val")
            weight = graph.call_function(flip, (weight,))
            if value is not None:
                weight.meta["val"] = value.t()
        new = graph.create_node(
            "call_function", target, (use.x, weight, bias), name=node.name + "_folded"
        )
    new.meta.update({key: value for key, value in node.meta.items() if key != "bone_fx"})
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _is_input(node: fx.Node) -> bool:
    return node.op in ("placeholder", "output") or node.is_impure()


def _drop_blocks(gm: fx.GraphModule) -> None:
    for name, _ in list(gm.named_modules()):
        if name.rpartition(".")[2] in (BLOCK, DROPOUT):
            owner, leaf = container(gm, name)
            delattr(owner, leaf)
    for name, module in reversed(list(gm.named_modules())):
        if name.endswith("_site") and not list(module.parameters()) and not list(module.children()):
            owner, leaf = container(gm, name)
            delattr(owner, leaf)
