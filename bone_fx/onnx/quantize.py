"""Products with constant weights become products with quantized ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from bone_fx.onnx.kernels import CONTRIB
from bone_fx.onnx.recipe_tensor import recipe_of, set_recipe
from bone_fx.weights.recipes.nbits import Scheme
from bone_fx.weights.recipes.quantized import (
    PartName,
    QuantizedWeight,
    behind_inputs,
    rows_in_float32,
)
from bone_fx.weights.recipes.recipe import Recipe
from bone_fx.weights.recipes.second_moments import SecondMoments

PARTS: tuple[PartName, ...] = ("codes", "scales", "zero_points")


@dataclass(frozen=True)
class Quantization:
    """What is quantized, and how.

    Attributes:
        weights: Scheme of every product but the head's.
        head: Scheme of the product that gives the logits; None keeps it.
        embeddings: Scheme of gathered weights; None keeps them.
        follow_head: Quantize an embedding that is tied to the head as the head is, and store both
            once.
        accuracy_level: Of MatMulNBits: 4 computes with activations in int8, 0 as it likes.
    """

    weights: Scheme
    head: Scheme | None
    embeddings: Scheme | None = None
    follow_head: bool = True
    accuracy_level: int = 0

    @property
    def calibrates(self) -> bool:
        """Whether a product gets 4 bits; with 8 there is nothing to gain from a calibration."""
        return any(scheme is not None and scheme.bits == 4 for scheme in (self.weights, self.head))


@dataclass
class Quantized:
    """What a run of the pass did: products and embeddings quantized, and why others were kept.

    `weighted` are the products whose inputs' second moments were used.
    """

    products: list[str] = field(default_factory=list)
    weighted: list[str] = field(default_factory=list)
    embeddings: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)


class QuantizeWeights(ir.passes.InPlacePass):
    """Replaces products with constant weights by MatMulNBits; reads no weight.

    Before: `MatMul(x, w [K, N])`
    After:  `com.microsoft::MatMulNBits(x, w.codes, w.scales, w.zero_points)`

    Before: `FusedMatMul(x, w [N, K], transB=1)`, `Gather(w, ids)`
    After:  `MatMulNBits(x, w.codes, …)`, `GatherBlockQuantized(Reshape(w.codes), ids, …)`

    Before: `Gemm(x, w, bias)`
    After:  `Add(MatMulNBits(x, w.codes, …), bias)`

    A symmetric weight has no zero points. A weight whose K is no multiple of the block size stays.

    Args:
        plan: What is quantized, and how.
        moments: Second moments of a weight's inputs by the id of the weight's recipe. A product of
            4 bits whose weight is made of such a recipe has its scales chosen for them.
    """

    def __init__(
        self, plan: Quantization, moments: Mapping[int, SecondMoments] | None = None
    ) -> None:
        super().__init__()
        self.plan = plan
        self.moments = moments or {}
        self.done = Quantized()
        self._made: dict[tuple[int, Scheme], tuple[ir.Value, ...]] = {}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Visits products, then gathered weights."""
        head = head_of(model.graph)
        modified = False
        heads: dict[int, Scheme] = {}
        for node in list(model.graph):
            stored = product_weight(node)
            if stored is None:
                continue
            scheme = self.plan.head if node is head else self.plan.weights
            weight = node.inputs[1]
            assert weight is not None
            if scheme is None or not self._fits(weight, stored, scheme):
                continue
            if node is head:
                heads[id(recipe_of(weight))] = scheme
            self._replace_product(model.graph, node, weight, stored, scheme)
            modified = True
        for node in list(model.graph):
            weight = _gathered(node)
            if weight is None:
                continue
            tied = heads.get(id(recipe_of(weight))) if self.plan.follow_head else None
            scheme = tied or self.plan.embeddings
            if scheme is not None and self._fits(weight, "NK", scheme):
                self._replace_gather(model.graph, node, weight, scheme)
                modified = True
        if modified:
            model.graph.opset_imports[CONTRIB] = 1
            for name, value in list(model.graph.initializers.items()):
                if not value.uses() and not value.is_graph_output():
                    model.graph.initializers.pop(name)
        return ir.passes.PassResult(model, modified)

    def _fits(self, weight: ir.Value, stored: str, scheme: Scheme) -> bool:
        recipe = recipe_of(weight)
        assert recipe is not None
        inputs = recipe.shape[stored.index("K")]
        if inputs % scheme.block_size == 0:
            return True
        self.done.kept[str(weight.name)] = (
            f"{inputs} inputs are no multiple of the block size {scheme.block_size}"
        )
        return False

    def _parts(
        self,
        graph: ir.Graph,
        weight: ir.Value,
        stored: str,
        scheme: Scheme,
        moments: SecondMoments | None = None,
    ) -> tuple[ir.Value, ...]:
        recipe = recipe_of(weight)
        assert recipe is not None
        key = (id(recipe), scheme)
        if key not in self._made:
            source = rows_in_float32(recipe, transposed=stored == "KN")
            quantized = QuantizedWeight(source, scheme, moments)
            suffix = "" if f"{weight.name}.codes" not in graph.initializers else f".{scheme.bits}"
            parts = []
            for name in PARTS[:2] if scheme.symmetric else PARTS:
                value = ir.Value(name=f"{weight.name}{suffix}.{name}")
                set_recipe(value, quantized.part(name))
                graph.register_initializer(value)
                parts.append(value)
            self._made[key] = tuple(parts)
        return self._made[key]

    def _replace_product(
        self, graph: ir.Graph, node: ir.Node, weight: ir.Value, stored: str, scheme: Scheme
    ) -> None:
        recipe = recipe_of(weight)
        assert recipe is not None
        inputs, outputs = (recipe.shape[stored.index(letter)] for letter in "KN")
        attributes = {"K": inputs, "N": outputs, "bits": scheme.bits}
        attributes["block_size"] = scheme.block_size
        if self.plan.accuracy_level:
            attributes["accuracy_level"] = self.plan.accuracy_level
        moments = self._moments_of(recipe, stored) if scheme.bits == 4 else None
        if moments is not None:
            self.done.weighted.append(str(weight.name))
        parts = self._parts(graph, weight, stored, scheme, moments)
        product = ir.node(
            "MatMulNBits", [node.inputs[0], *parts], attributes, domain=CONTRIB, name=node.name
        )
        nodes = [product]
        if node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
            nodes.append(ir.node("Add", [product.outputs[0], node.inputs[2]]))
        ir.convenience.replace_nodes_and_values(
            graph, node, [node], nodes, node.outputs, nodes[-1].outputs
        )
        self.done.products.append(str(weight.name))

    def _moments_of(self, recipe: Recipe, stored: str) -> SecondMoments | None:
        """The moments of a weight's inputs; weights packed into one product share their inputs."""
        inputs = stored.index("K")
        candidates = (self.moments.get(id(part)) for part in behind_inputs(recipe, inputs))
        moments = next((m for m in candidates if m is not None), None)
        fits = moments is not None and len(moments) == recipe.shape[inputs]
        return moments if fits else None

    def _replace_gather(
        self, graph: ir.Graph, node: ir.Node, weight: ir.Value, scheme: Scheme
    ) -> None:
        recipe = recipe_of(weight)
        assert recipe is not None
        rows, columns = recipe.shape
        codes, *rest = self._parts(graph, weight, "NK", scheme)
        shape = ir.Value(name=f"{codes.name}.rows")
        shape.const_value = ir.tensor([rows, columns * scheme.bits // 8], name=shape.name)
        shape.shape, shape.dtype = ir.Shape([2]), ir.DataType.INT64
        graph.register_initializer(shape)
        # MatMulNBits and GatherBlockQuantized declare the same bytes with different shapes.
        flat = ir.node("Reshape", [codes, shape])
        attributes = {"bits": scheme.bits, "block_size": scheme.block_size}
        attributes |= {"gather_axis": 0, "quantize_axis": 1}
        gather = ir.node(
            "GatherBlockQuantized",
            [flat.outputs[0], node.inputs[1], *rest],
            attributes,
            domain=CONTRIB,
            name=node.name,
        )
        ir.convenience.replace_nodes_and_values(
            graph, node, [node], [flat, gather], node.outputs, gather.outputs
        )
        self.done.embeddings.append(str(weight.name))


def product_weight(node: ir.Node) -> str | None:
    """How the constant weight of a product is stored, `KN` or `NK`; None for any other node."""
    if len(node.inputs) < 2:
        return None
    recipe = recipe_of(node.inputs[1])
    if recipe is None or len(recipe.shape) != 2 or not recipe.dtype.is_floating_point:
        return None
    values = {name: attribute.value for name, attribute in node.attributes.items()}
    if (node.domain, node.op_type) == ("", "MatMul"):
        return "KN"
    plain = not values.get("transA") and values.get("alpha", 1.0) == 1.0
    if (node.domain, node.op_type) == (CONTRIB, "FusedMatMul"):
        batched = values.get("transBatchA") or values.get("transBatchB")
        return ("NK" if values.get("transB") else "KN") if plain and not batched else None
    if (node.domain, node.op_type) == ("", "Gemm"):
        return (
            ("NK" if values.get("transB") else "KN")
            if plain and values.get("beta", 1.0) == 1.0
            else None
        )
    return None


def head_of(graph: ir.Graph) -> ir.Node | None:
    """The one product with a constant weight that `logits` comes through; None if there is none."""
    start = next((value for value in graph.outputs if value.name == "logits"), None)
    readers: set[ir.Node] = set()
    seen: set[ir.Value] = set()
    waiting = [start]
    while waiting:
        value = waiting.pop()
        if value is None or value in seen:
            continue
        seen.add(value)
        node = value.producer()
        if node is None:
            continue
        if product_weight(node) is not None or node.op_type == "MatMulNBits":
            readers.add(node)
        else:
            waiting += node.inputs
        if len(readers) > 1:
            return None
    return next(iter(readers), None)


def _gathered(node: ir.Node) -> ir.Value | None:
    """The constant matrix whose rows a Gather takes."""
    if (node.domain, node.op_type) != ("", "Gather"):
        return None
    axis = node.attributes.get("axis")
    recipe = recipe_of(node.inputs[0])
    if (axis is not None and axis.value != 0) or recipe is None or len(recipe.shape) != 2:
        return None
    return node.inputs[0] if recipe.dtype.is_floating_point else None
