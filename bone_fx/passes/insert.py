"""Insert: put block-adaptation nodes on the linear sites that a configuration targets.

Before:  %y = aten.linear(%x [T, I], %q_proj_weight [O, I], %bias)
After:   %y = bone_fx.adapted_linear(%x, %q_proj_weight, %bias, [%block], ['bone'], [], False)

A site that already carries adapters gets one more block in its node: one node a site, however many
adapters.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from bone_fx.adapters import METHODS
from bone_fx.config import BoneConfig
from bone_fx.dialects import LinearUse, find_sites, read_use
from bone_fx.dialects.adapted_calls import META, AdaptedArguments
from bone_fx.errors import SiteError
from bone_fx.graphs import container, fake_like
from bone_fx.operators import ADAPTED_LINEAR
from bone_fx.passes.frame import Outcome, on_a_copy
from bone_fx.passes.untie import untie_weights
from bone_fx.sites import LinearSite, Refusal, check_fit, is_trained_whole, select_sites

BLOCK = "bone_block"
"""Name under which a site owns its blocks: `<site>.bone_block.<adapter>`."""

DROPOUT = "bone_dropout"
"""Name under which a site of a graph without dropout literals owns its dropout modules."""


@on_a_copy
def insert_adapters(
    gm: fx.GraphModule,
    config: BoneConfig,
    adapter_name: str = "default",
    *,
    blocks: Mapping[str, Tensor] | None = None,
    output_layers: Collection[str] = (),
    freeze_base: bool = True,
    untie: bool = False,
    recompute: bool = True,
) -> Outcome:
    """Insert one adapter.

    Args:
        gm: A traced graph, by `torch.fx.symbolic_trace` or `torch.export`; it is left as it was.
        config: What to insert and where.
        adapter_name: Name of the adapter; its blocks are `<site>.bone_block.<adapter_name>`.
        blocks: Trained blocks by site, used as they are; None draws fresh ones, in module order.
        output_layers: Sites that `target_modules="all-linear"` leaves out.
        freeze_base: Freeze every parameter that is neither a block nor in `modules_to_save`; a tied
            weight of these becomes their own.
        untie: Allow a target whose weight is shared with another layer, by giving that layer its
            own name for it.
        recompute: Fold BAT's weights again in backward. False keeps them from the forward: faster,
            and one float32 weight a layer more memory.

    Returns:
        The adapted graph; `applied` lists the sites, `refused` the targets that could not be
        adapted.

    Raises:
        SiteError: Nothing matched, a block does not fit its layer, a name is taken, or a target is
            tied.

    Examples:
        >>> import bone_fx
        >>> net = nn.Sequential(nn.Linear(48, 80), nn.ReLU(), nn.Linear(80, 7))
        >>> config = bone_fx.BoneConfig(r=16, target_modules=["0"])
        >>> result = bone_fx.insert_adapters(fx.symbolic_trace(net), config)
        >>> [site.name for site in result.applied]
        ['0']
        >>> [name for name, p in result.graph_module.named_parameters() if p.requires_grad]
        ['0.bone_block.default']
    """
    if not adapter_name or "." in adapter_name or hasattr(nn.Module(), adapter_name):
        raise SiteError(
            f"adapter name {adapter_name!r} cannot be used",
            expected="a name without a dot that is no attribute of torch's modules",
        )
    search = find_sites(gm)
    chosen, refused = select_sites(config, search.sites, search.others, output_layers)
    untie_weights(gm, chosen, untie=untie)
    if freeze_base:
        refused += _freeze(gm, config)
    fresh = {} if blocks else new_blocks(config, _in_module_order(gm, chosen))
    for site in chosen:
        check_fit(config, site)
        _refuse_both_ways(site, search.uses)
        adapter_blocks = fresh[site.name] if not blocks else _given(blocks, site, config)
        _mount(gm, site, adapter_name, adapter_blocks)
    names = {site.name for site in chosen}
    for node in [use.node for use in find_sites(gm).uses if use.site.name in names]:
        use = read_use(gm, node)  # again: its input may be a node rewritten before it
        if use is not None:
            _rewrite(gm, use, config, adapter_name, recompute=recompute)
    return Outcome(modified=True, applied=tuple(chosen), refused=tuple(refused))


def _refuse_both_ways(site: LinearSite, uses: Iterable[LinearUse]) -> None:
    """One block cannot be added to a weight and to its transpose."""
    ways = {use.site.transposed for use in uses if use.site.weight_name == site.weight_name}
    if len(ways) > 1:
        raise SiteError(
            f"{site.name}: its weight is used as it is and transposed",
            expected="one way",
            next_step="leave it out with exclude_modules",
        )


def new_blocks(config: BoneConfig, sites: list[LinearSite]) -> dict[str, Tensor]:
    """Fresh float32 blocks by site.

    Zeros, or PEFT 0.18.1's Kaiming uniform for `init_weights=False`.
    """
    blocks = {}
    for site in sites:
        check_fit(config, site)
        shape = METHODS[config.method].block_shape(
            site.in_features, site.out_features, config.r, config.mini_r
        )
        block = torch.zeros(shape)
        if config.init_weights is False:
            nn.init.kaiming_uniform_(block, a=math.sqrt(5))
        blocks[site.name] = block
    return blocks


def _given(blocks: Mapping[str, Tensor], site: LinearSite, config: BoneConfig) -> Tensor:
    shape = METHODS[config.method].block_shape(
        site.in_features, site.out_features, config.r, config.mini_r
    )
    block = blocks.get(site.name)
    if block is None or tuple(block.shape) != shape:
        actual = "none" if block is None else list(block.shape)
        raise SiteError(
            f"{site.name}: the block does not fit", expected=f"shape {list(shape)}", found=actual
        )
    return block


def _in_module_order(gm: fx.GraphModule, sites: list[LinearSite]) -> list[LinearSite]:
    order = {name: i for i, (name, _) in enumerate(gm.named_parameters(remove_duplicate=False))}
    return sorted(sites, key=lambda site: order.get(site.weight_name, len(order)))


def _freeze(gm: fx.GraphModule, config: BoneConfig) -> list[Refusal]:
    """Freeze all but blocks and `modules_to_save`, whose tied weights become their own, as in PEFT.

    Returns:
        Modules to save whose weight the graph does not tell from that of a frozen module.
    """
    names_of: dict[nn.Parameter, list[str]] = {}
    for name, parameter in gm.named_parameters(remove_duplicate=False):
        if f".{BLOCK}." not in name and parameter.is_floating_point():
            names_of.setdefault(parameter, []).append(name)
    refused = []
    for parameter, names in names_of.items():
        saved = [name for name in names if is_trained_whole(config, name)]
        parameter.requires_grad_(saved == names)
        if not saved or saved == names:
            continue
        tied = [name for name in names if name not in saved]
        if not all(_is_read(gm, name) for name in (saved[0], tied[0])):
            reason = f"its weight is tied to {tied[0]}, and the graph reads both under one name"
            refused.append(Refusal(saved[0].rpartition(".")[0], reason))
            continue
        trained = nn.Parameter(parameter.detach().clone())
        for name in saved:
            owner, leaf = container(gm, name)
            owner.register_parameter(leaf, trained)
    return refused


def _is_read(gm: fx.GraphModule, name: str) -> bool:
    """Whether a graph reads a parameter under this name."""
    return any(
        (node.op == "get_attr" and node.target == name and node.users)
        or (node.op == "call_module" and name.startswith(f"{node.target}."))
        for node in gm.graph.nodes
    )


def _mount(gm: fx.GraphModule, site: LinearSite, adapter_name: str, block: Tensor) -> None:
    owner, leaf = container(gm, f"{site.block_owner}.{BLOCK}.{adapter_name}")
    if leaf in owner._parameters:
        raise SiteError(
            f"{site.name}: there is already an adapter {adapter_name!r}",
            next_step="use another name",
        )
    weight = gm.get_parameter(site.weight_name)
    parameter = block if isinstance(block, nn.Parameter) else nn.Parameter(block.to(weight.device))
    owner.register_parameter(leaf, parameter)


def _rewrite(
    gm: fx.GraphModule, use: LinearUse, config: BoneConfig, adapter_name: str, *, recompute: bool
) -> None:
    graph, node, site = gm.graph, use.node, use.site
    block_name = f"{site.block_owner}.{BLOCK}.{adapter_name}"
    with graph.inserting_before(node):
        block = constant(gm, node, block_name)
        branch = _dropout(gm, use, adapter_name, config.miss_dropout)
        if node.target is ADAPTED_LINEAR:
            now = AdaptedArguments.of(node)
        else:
            bias = constant(gm, node, use.bias) if isinstance(use.bias, str) else use.bias
            weight = constant(gm, node, site.weight_name)
            now = AdaptedArguments(use.x, weight, bias, [], [], [], site.transposed)
        inputs = [*now.block_inputs, branch]
        if not now.block_inputs:
            inputs = [now.x] * len(now.blocks) + [branch] if branch is not now.x else []
        arguments = (
            now.x,
            now.weight,
            now.bias,
            [*now.blocks, block],
            [*now.methods, config.method],
            inputs,
            now.transposed,
        )
        options: dict[str, Any] = {} if recompute and now.recompute else {"recompute": False}
        name = site.name.replace(".", "_")
        new = graph.create_node("call_function", ADAPTED_LINEAR, arguments, options, name=name)
    new.meta.update(node.meta)
    new.meta[META] = (site, use.family)
    node.replace_all_uses_with(new)
    dead = [node, *node.all_input_nodes]
    for old in dead:
        if not old.users and old.op != "placeholder":
            graph.erase_node(old)


def constant(gm: fx.GraphModule, like: fx.Node, name: str) -> fx.Node:
    """A `get_attr` node for a parameter, with a true `meta["val"]` if the trace has values."""
    node = gm.graph.get_attr(name)
    value = fake_like(like, gm.get_parameter(name))
    if value is not None:
        node.meta["val"] = value
    return node


def _dropout(gm: fx.GraphModule, use: LinearUse, adapter_name: str, probability: float) -> fx.Node:
    """The adapter's own input: `x`, or `x` under dropout that `train()` and `eval()` switch."""
    if not probability:
        return use.x
    if use.family == "functional":
        name = f"{use.site.block_owner}.{DROPOUT}.{adapter_name}"
        owner, leaf = container(gm, name)
        owner.add_module(leaf, nn.Dropout(probability).train(gm.training))
        return gm.graph.call_module(name, (use.x,))
    node = gm.graph.call_function(torch.ops.aten.dropout.default, (use.x, probability, True))
    sources = (("val", use.x), ("nn_module_stack", use.node))
    node.meta.update({key: source.meta[key] for key, source in sources if key in source.meta})
    return node
