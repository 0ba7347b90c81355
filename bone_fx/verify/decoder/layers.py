"""Where the layers of a reference stand in a written graph.

A node belongs to the last layer whose constants it or its inputs read: `model.layers.3.mlp.…`. What
leaves layer k is what later layers read of the nodes up to it: one value, or the parts of a
residual that a fused norm adds. So a graph is cut behind its first layers, and a long text costs
two layers and not thirty.

Shape letters: B batch, S tokens, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx
from torch import nn

from bone_fx.errors import LOOK, VerificationError
from bone_fx.onnx.packed_names import parts_of

_ATTENTION = ("GroupQueryAttention", "MultiHeadAttention", "Attention")


@dataclass(frozen=True)
class LayerList:
    """The list of a model's layers.

    Attributes:
        path: Its name, `model.layers`.
        layers: The layers.
    """

    path: str
    layers: nn.ModuleList

    @classmethod
    def of(cls, model: nn.Module) -> LayerList | None:
        """The list of as many layers as the configuration has; None if there is none."""
        config: Any = model.config
        count = getattr(config.get_text_config(), "num_hidden_layers", None)
        lists = [
            cls(name, module)
            for name, module in model.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == count
        ]
        return max(lists, key=lambda each: _size(each.layers), default=None)

    def kinds(self, config: Any) -> list[str]:
        """What tells a layer from others: shapes, and its place in lists of the configuration."""
        fields = config.get_text_config().to_dict().values()
        lists = [v for v in fields if isinstance(v, list) and len(v) == len(self.layers)]
        shapes = [tuple(p.shape for p in layer.parameters()) for layer in self.layers]
        return [repr(kind) for kind in zip(shapes, *lists, strict=True)]

    def distinct(self, config: Any) -> int:
        """How many layers from the first hold one of every kind."""
        kinds = self.kinds(config)
        return max(kinds.index(kind) for kind in set(kinds)) + 1


def check_alike(graph: onnx.GraphProto, layers: LayerList, config: Any) -> None:
    """Hold the attention of later layers to that of the first of their kind, which is run.

    Windows and the kind of rotation are whole numbers; a scale may depend on the layer.

    Raises:
        VerificationError: A layer attends otherwise than others of its kind.
    """
    nodes = [node for node in graph.node if node.op_type in _ATTENTION]
    if len(nodes) != len(layers.layers):
        return
    first: dict[str, dict[str, int]] = {}
    for number, (kind, node) in enumerate(zip(layers.kinds(config), nodes, strict=True)):
        numbers = {a.name: a.i for a in node.attribute if a.type == onnx.AttributeProto.INT}
        expected = first.setdefault(kind, numbers)
        if numbers != expected:
            raise VerificationError(
                f"verification failed: {layers.path}.{number}: it attends otherwise than the"
                f" layers that are like it (node {node.op_type} {node.name or node.output[0]})",
                expected=dict(sorted(expected.items())),
                found=dict(sorted(numbers.items())),
                next_step=LOOK,
            )


def layer_outputs(graph: onnx.GraphProto, path: str) -> dict[int, list[str]]:
    """Names of the values that later layers read of a layer and those before it, by layer.

    Those of the shape `[B, S, H]` are the parts of a sum: the layer's output.
    """
    levels, after_all = _levels(graph, path)
    depth: dict[str, int] = {}
    readers: dict[str, list[int]] = {}
    for node, level in zip(graph.node, levels, strict=True):
        for name in node.output:
            depth[name] = level
        for name in node.input:
            readers.setdefault(name, []).append(level)
    return {
        layer: [
            name
            for name, level in depth.items()
            if level <= layer and any(reader > layer for reader in readers.get(name, []))
        ]
        for layer in range(after_all)
    }


def reading_layers(graph: onnx.GraphProto, path: str, constant: str) -> list[int]:
    """The layers that read a constant, or what is computed from it before all of them."""
    levels, after_all = _levels(graph, path)
    derived, layers = {constant}, set()
    for node, level in zip(graph.node, levels, strict=True):
        if derived.isdisjoint(node.input):
            continue
        if level < 0:
            derived.update(node.output)
        elif level < after_all:
            layers.add(level)
    return sorted(layers)


def _levels(graph: onnx.GraphProto, path: str) -> tuple[list[int], int]:
    """The layer of each node, -1 before all, and the number of what stands behind all."""
    prefix = f"{path}."
    constants = {tensor.name for tensor in graph.initializer}

    def layer_of_constant(name: str) -> int | None:
        for part in parts_of(name):
            if part.startswith(prefix):
                return int(part.removeprefix(prefix).partition(".")[0])
        return None

    after_all = 1 + max(
        (k for name in constants if (k := layer_of_constant(name)) is not None), default=-1
    )
    depth: dict[str, int] = {}
    levels = []
    for node in graph.node:
        of_constants = [k for n in node.input if (k := layer_of_constant(n)) is not None]
        of_values = [depth[n] for n in node.input if n in depth]
        level = max([*of_constants, *of_values], default=-1)
        of_others = any(n in constants and "." in n for n in node.input) and not of_constants
        if of_others and of_values and level == after_all - 1:
            level = after_all  # the last norm and the head
        levels.append(level)
        depth.update(dict.fromkeys(node.output, level))
    return levels, after_all


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
