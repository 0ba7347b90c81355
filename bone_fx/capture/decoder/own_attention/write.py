"""Puts one operator in the place of attention that a model computes by itself.

Before:
    keys:   [B, K, T, D] = Present(k, past_key, last, total, bias)
    values: [B, K, T, D] = Present(v, past_value)
    output: [B, S, H*D] = the model's own code on q, keys, values and its mask

After:
    output, present_key, present_value: GroupQueryAttention(q, k, v, past_key, past_value, last,
        total, , , , bias)

Or, where that operator cannot be had, in plain operators with a concatenated cache.

Shape letters: B batch, H query heads, K key/value heads, S new tokens, T past and new tokens, D
head size.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from bone_fx.capture.decoder.own_attention.joining_cache import Computed
from bone_fx.capture.decoder.own_attention.regions import LAYOUT, Region, Runner
from bone_fx.capture.decoder.own_attention.shared_heads import each_once
from bone_fx.lower.stamp import DOMAIN, EXIT
from bone_fx.lower.symbolic import (
    CONTRIB,
    MULTIPLE,
    ONNX_DTYPES,
    is_operator,
    operands,
    rewrite,
)
from bone_fx.passes.frame import erase_unread

aten = torch.ops.aten


def write_attention(
    program: ExportedProgram, regions: Sequence[Region], computed: Mapping[int, Computed]
) -> None:
    """Writes each region as GroupQueryAttention 1 of com.microsoft, in place.

    Args:
        program: The trace.
        regions: Its regions.
        computed: What each computes, by layer.
    """
    sizes = _sizes(program)
    for region in regions:
        _write(program.graph, region, computed[region.layer], sizes)
    program.graph.eliminate_dead_code()


def _write(graph: Graph, region: Region, computed: Computed, sizes: list[Node]) -> None:
    key, past_key, last, total, *bias = operands(region.key)
    value, past_value = operands(region.value)
    assert key is not None
    assert value is not None
    with graph.inserting_before(region.output):
        key, value = (each_once(graph, x, LAYOUT, sizes) for x in (key, value))
        flat = [_flat(graph, node, sizes) for node in (region.query, key, value)]
        inputs = [*flat, past_key, past_value, last, total, None, None, None, *bias]
        outputs: list[Tensor] = [n.meta["val"] for n in (region.output, region.key, region.value)]
        batch, tokens, length = sizes
        shapes: list[list[Any]] = [
            [batch, tokens, outputs[0].shape[2]],
            *([batch, x.shape[1], length, x.shape[3]] for x in outputs[1:]),
        ]
        dtypes = [ONNX_DTYPES[x.dtype] for x in outputs]
        attention = graph.call_function(
            MULTIPLE,
            (inputs, "GroupQueryAttention", dtypes),
            {
                "shapes": shapes,
                "domain": CONTRIB,
                "version": 1,
                "metadata_props_keys": [],
                "metadata_props_values": [],
            },
        )
        attention.meta = {**region.output.meta, "val": tuple(outputs)}
        settings: dict[str, int | float] = {
            "num_heads": computed.heads,
            "kv_num_heads": int(outputs[1].shape[1]),
            "scale": computed.scale,
        }
        rewrite(attention, inputs, settings)
        output, *presents = (
            graph.call_function(operator.getitem, (attention, place)) for place in range(3)
        )
    for node, of in zip(
        (output, *presents), (region.output, region.key, region.value), strict=True
    ):
        node.meta = dict(of.meta)
    _replace(graph, region, output, presents)


def write_out_attention(
    program: ExportedProgram, regions: Sequence[Region], computed: Mapping[int, Computed]
) -> None:
    """Writes each region in ATen operators, in place; the marks carry a bias that hides.

    Args:
        program: The trace.
        regions: Its regions.
        computed: What each computes, by layer.
    """
    sizes = _sizes(program)
    for region in regions:
        _write_out(program.graph, region, computed[region.layer], sizes)
    program.graph.eliminate_dead_code()


def _write_out(graph: Graph, region: Region, computed: Computed, sizes: list[Node]) -> None:
    new_key, past_key, _, _, bias = operands(region.key)
    new_value, past_value = operands(region.value)
    meta = {k: v for k, v in region.output.meta.items() if k != "val"}

    def call(target: Any, *args: Any) -> Node:
        node = graph.call_function(target, args)
        values = map_arg(args, lambda n: n.meta["val"])
        node.meta = {**meta, "val": target(*values)}
        return node

    with graph.inserting_before(region.output):
        presents = [
            call(aten.cat.default, [past_key, new_key], 2),
            call(aten.cat.default, [past_value, new_value], 2),
        ]
        groups = computed.heads // int(region.key.meta["val"].shape[1])
        key, value = presents
        if groups > 1:
            key, value = (call(aten.repeat_interleave.self_int, x, groups, 1) for x in presents)
        products = call(aten.matmul.default, region.query, call(aten.transpose.int, key, 2, 3))
        scores = call(aten.add.Tensor, call(aten.mul.Tensor, products, computed.scale), bias)
        weights = call(aten.softmax.int, scores, 3, torch.float32)
        dtype = region.query.meta["val"].dtype
        if dtype != torch.float32:
            weights = call(aten.to.dtype, weights, dtype)
        heads = call(aten.transpose.int, call(aten.matmul.default, weights, value), 1, 2)
        shape = [*sizes[:2], region.output.meta["val"].shape[2]]
        output = call(aten.reshape.default, heads, shape)
    _replace(graph, region, output, presents)


def _replace(graph: Graph, region: Region, output: Node, presents: Sequence[Node]) -> None:
    for mark, present in zip((region.key, region.value), presents, strict=True):
        for user in list(mark.users):
            if user.op == "output" or is_operator(user, DOMAIN, EXIT):
                user.replace_input_with(mark, present)
    region.output.replace_all_uses_with(output)
    erase_unread(graph, region.output)


def _sizes(program: ExportedProgram) -> list[Node]:
    """B, S and T, for all layers."""
    runner, graph = Runner(program), program.graph
    first = next(node for node in graph.nodes if node.op != "placeholder")
    sizes = []
    with graph.inserting_before(first):
        for node, axis in ((runner.ids, 0), (runner.ids, 1), (runner.mask, 1)):
            sizes.append(graph.call_function(aten.sym_size.int, (node, axis)))
            sizes[-1].meta["val"] = node.meta["val"].shape[axis]
    return sizes


def _flat(graph: Graph, heads: Node, sizes: list[Node]) -> Node:
    """[B, S, H*D] from [B, H, S, D]."""
    value = heads.meta["val"]
    width = int(value.shape[1]) * int(value.shape[3])
    turned = graph.call_function(aten.transpose.int, (heads, 1, 2))
    turned.meta = {**heads.meta, "val": value.transpose(1, 2)}
    flat = graph.call_function(aten.reshape.default, (turned, [*sizes[:2], width]))
    shape = (value.shape[0], value.shape[2], width)
    flat.meta = {**heads.meta, "val": turned.meta["val"].reshape(shape)}
    return flat
