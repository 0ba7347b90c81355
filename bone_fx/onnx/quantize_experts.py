"""Mixtures of experts become mixtures with quantized weights."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import onnx_ir as ir
import torch

from bone_fx.onnx.kernels import CONTRIB
from bone_fx.onnx.quantize import PARTS
from bone_fx.onnx.recipe_tensor import recipe_of, set_recipe
from bone_fx.weights.recipes.experts import QuantizedExperts
from bone_fx.weights.recipes.nbits import Scheme
from bone_fx.weights.recipes.quantized import behind_inputs, rows_in_float32
from bone_fx.weights.recipes.recipe import Recipe, dtype_name
from bone_fx.weights.recipes.second_moments import SecondMoments

BLOCK_SIZES = (128, 64, 32)
"""Values that may share a scale in QMoE on CUDA and in its kernel for the CPU, the most first."""

SCALE_DTYPE = torch.float16
"""Of scales: the kernel for CUDA takes no wider ones; for the one for the CPU they are widened when
a session loads them."""

SMALLEST_TILE = {"cpu": 1, "cuda": 64}
"""What both products' inputs have to be a multiple of (contrib_ops/cuda/moe/moe_quantization.cc:
the tile of the interleaved weights)."""

PLACES = {"codes": (2, 5), "scales": (3, 6), "zero_points": (11, 12)}
"""Inputs of QMoE: a part of the first product's weights, and of the second's."""

ROUTER_WEIGHTS = 14
"""Input of QMoE: what each expert counts, where that is not the softmax of the chosen scores."""

_MOE_WEIGHTS, _MOE_BIASES, _MOE_THIRD = (2, 4), (3, 5), 6
_OF_STACKS = ("Gather", "GatherND", "MatMul")
_RANK = 3


@dataclass
class QuantizedMixtures:
    """What a run of the pass did.

    Attributes:
        mixtures: Names of the nodes that were quantized.
        weights: Names of their weights.
        weighted: Those whose inputs' second moments were used.
        block_sizes: Values that share a scale, in the order of the mixtures.
        kept: Why the others were kept, by the name of the weights.
        kept_bytes: Their bytes by the dtype that they stay in and by that reason.
    """

    mixtures: list[str] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)
    weighted: list[str] = field(default_factory=list)
    block_sizes: list[int] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    kept_bytes: Counter[tuple[str, str]] = field(default_factory=Counter)


class QuantizeExperts(ir.passes.InPlacePass):
    """Replaces mixtures of experts with constant weights by QMoE; reads no weight.

    Before: `MoE(x, scores, up [X, 2 * I, H], up_bias, down [X, H, I], down_bias)`
    After:  `QMoE(x, scores, up.codes, up.scales, up_bias, down.codes, down.scales, down_bias, …,
            up.zero_points, down.zero_points)`

    The rows lie as MatMulNBits has them, expert after expert. Where the weights of the chosen
    experts need not add up to 1, the softmax of all scores is one more input: without it QMoE's
    kernel for the CPU normalizes whatever it is told. That for CUDA computes it by itself.

    Args:
        scheme: How products are quantized. Experts have `SCALE_DTYPE` scales, and of `BLOCK_SIZES`
            the nearest that both of their products can be cut into.
        provider: `"cpu"` or `"cuda"`, what the graph is written for.
        accuracy_level: Of QMoE: 4 computes with activations in int8, 0 as it likes.
        moments: Second moments of the inputs of all experts by the id of the weights' recipe. With
            4 bits scales are chosen for them.
    """

    def __init__(
        self,
        scheme: Scheme,
        provider: str,
        accuracy_level: int = 0,
        moments: Mapping[int, SecondMoments] | None = None,
    ) -> None:
        super().__init__()
        self.scheme = replace(scheme, scale_dtype=SCALE_DTYPE)
        self.provider = provider
        self.accuracy_level = accuracy_level
        self.moments = moments or {}
        self.done = QuantizedMixtures()

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Visits mixtures of experts, then the experts of others."""
        modified = False
        for node in list(model.graph):
            if (node.domain, node.op_type) != (CONTRIB, "MoE"):
                continue
            weights = [node.inputs[place] for place in _MOE_WEIGHTS]
            reason = self._why_kept(node)
            if reason is not None:
                self._keep([w for w in weights if w is not None], reason)
                continue
            self._replace(model.graph, node)
            modified = True
        for weight in _written_out(model.graph):
            self._keep([weight], "its experts are written out as products that nothing quantizes")
        if modified:
            for name, value in list(model.graph.initializers.items()):
                if not value.uses() and not value.is_graph_output():
                    model.graph.initializers.pop(name)
        return ir.passes.PassResult(model, modified)

    def _why_kept(self, node: ir.Node) -> str | None:
        """Why a mixture is kept; None if QMoE takes it."""
        recipes = [recipe_of(node.inputs[place]) for place in _MOE_WEIGHTS]
        if any(recipe is None or len(recipe.shape) != _RANK for recipe in recipes):
            return "its experts are not constant"
        fused = node.attributes.get_int("swiglu_fusion", 0) == 1
        third = len(node.inputs) > _MOE_THIRD and node.inputs[_MOE_THIRD] is not None
        if not fused or third:
            return "QMoE's kernel for the CPU takes interleaved SwiGLU alone"
        inputs = [recipe.shape[-1] for recipe in recipes if recipe is not None]
        tile = SMALLEST_TILE[self.provider]
        if any(count % tile for count in inputs):
            return f"{inputs} inputs are not all multiples of {tile}, as QMoE on CUDA needs them"
        if self._block_size(inputs) is None:
            return f"{inputs} inputs are not all multiples of a block size that QMoE takes"
        return None

    def _block_size(self, inputs: list[int]) -> int | None:
        """The size nearest to the chosen one that all numbers of inputs are multiples of."""
        most = max(self.scheme.block_size, BLOCK_SIZES[-1])
        fitting = (s for s in BLOCK_SIZES if s <= most and not any(n % s for n in inputs))
        return next(fitting, None)

    def _replace(self, graph: ir.Graph, node: ir.Node) -> None:
        weights = [node.inputs[place] for place in _MOE_WEIGHTS]
        recipes = [recipe_of(weight) for weight in weights]
        size = self._block_size([recipe.shape[-1] for recipe in recipes if recipe is not None])
        assert size is not None
        scheme = replace(self.scheme, block_size=size)
        inputs: list[ir.Value | None] = [None] * (ROUTER_WEIGHTS + 1)
        inputs[:2] = node.inputs[:2]
        for which, weight in enumerate(weights):
            assert weight is not None
            for name, value in self._parts(graph, weight, scheme).items():
                inputs[PLACES[name][which]] = value
            bias = _MOE_BIASES[which]
            if len(node.inputs) > bias:
                inputs[PLACES["scales"][which] + 1] = node.inputs[bias]
        attributes = {name: each.value for name, each in node.attributes.items()}
        attributes |= {"expert_weight_bits": scheme.bits, "block_size": size, "quant_type": "int"}
        attributes["weights_prepacked"] = 0
        if self.accuracy_level:
            attributes["accuracy_level"] = self.accuracy_level
        nodes = []
        if not attributes.get("normalize_routing_weights"):
            softmax = ir.node("Softmax", [node.inputs[1]], {"axis": -1})
            inputs[ROUTER_WEIGHTS] = softmax.outputs[0]
            nodes.append(softmax)
        while inputs[-1] is None:
            inputs.pop()
        mixture = ir.node("QMoE", inputs, attributes, domain=CONTRIB, name=node.name)
        ir.convenience.replace_nodes_and_values(
            graph, node, [node], [*nodes, mixture], node.outputs, mixture.outputs
        )
        self.done.mixtures.append(str(mixture.name or mixture.outputs[0].name))
        self.done.block_sizes.append(size)

    def _parts(self, graph: ir.Graph, weight: ir.Value, scheme: Scheme) -> dict[str, ir.Value]:
        recipe = recipe_of(weight)
        assert recipe is not None
        moments = self._moments_of(recipe) if scheme.bits == 4 else None
        source = rows_in_float32(recipe, transposed=False)
        quantized = QuantizedExperts(source, scheme, moments)
        parts = {}
        for name in PARTS[:2] if scheme.symmetric else PARTS:
            value = ir.Value(name=f"{weight.name}.{name}")
            set_recipe(value, quantized.part(name))
            graph.register_initializer(value)
            parts[str(name)] = value
        self.done.weights.append(str(weight.name))
        if moments is not None:
            self.done.weighted.append(str(weight.name))
        return parts

    def _moments_of(self, recipe: Recipe) -> SecondMoments | None:
        candidates = (self.moments.get(id(part)) for part in behind_inputs(recipe, _RANK - 1))
        moments = next((m for m in candidates if m is not None), None)
        return moments if moments is not None and len(moments) == recipe.shape[-1] else None

    def _keep(self, weights: list[ir.Value], reason: str) -> None:
        for weight in weights:
            self.done.kept[str(weight.name)] = reason
            recipe = recipe_of(weight)
            if recipe is not None:
                nbytes = math.prod(recipe.shape) * recipe.dtype.itemsize
                self.done.kept_bytes[dtype_name(recipe.dtype), reason] += nbytes


def _written_out(graph: ir.Graph) -> Iterator[ir.Value]:
    """Stacks of matrices, one an expert, that are gathered by expert or multiplied all at once."""
    for value in graph.initializers.values():
        recipe = recipe_of(value)
        if recipe is None or len(recipe.shape) != _RANK or not recipe.dtype.is_floating_point:
            continue
        stacked = math.prod(recipe.shape[1:]) > max(recipe.shape[1:])
        if stacked and any(node.op_type in _OF_STACKS for node, _ in value.uses()):
            yield value
