"""Where a graph first differs from the reference: the layer, and the node of the graph.

A node that reads a module's constants computes that module's output, so graph and reference can be
compared module by module, in the order of the graph.

Shape letters: T tokens, I in_features, O out_features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx
import torch
from torch import Tensor, nn

from bone_fx.errors import VerificationError
from bone_fx.onnx.packed_names import groups_of, parts_of
from bone_fx.verify.graph import Edit, WrittenGraph
from bone_fx.verify.parity import difference
from bone_fx.weights.recipes.reorder import row_order

if TYPE_CHECKING:
    import onnxruntime

Run = Callable[["onnxruntime.InferenceSession"], Sequence[Any]]
"""Runs a session with all of its outputs."""

_SHARES = (1.0, 0.3, 0.1)
"""Parts of the tolerance at which an output is looked for: what differs first may differ less."""
_OF_MODULES = ("MatMul", "Gemm", "Gather", "Conv", "Norm", "MoE")
"""What stands in the name of an operator that computes a module's output."""
_PRODUCTS = ("MatMul", "FusedMatMul")
_BATCH_TOKENS_FEATURES = 3
_SUFFIXES = (".T", "_plus_one", ".codes", ".8")


@dataclass(frozen=True)
class _Product:
    """A node that computes the outputs of modules.

    Attributes:
        node: The node.
        output: Name of its output, with the bias where a node behind it adds one.
        modules: The modules, in the order in which their outputs stand side by side.
        order: Groups and widths of rows that were put part by part; None where they were not.
        without_bias: Whether it is a product whose bias a later node adds with something else.
    """

    node: onnx.NodeProto
    output: str
    modules: tuple[str, ...]
    order: tuple[int, tuple[int, ...]] | None
    without_bias: bool


def located(error: VerificationError, where: str | None) -> VerificationError:
    """The same error with the layer that differs first."""
    if where is None:
        return error
    return VerificationError(
        f"{error.what}; the first layer that differs: {where}",
        expected=error.expected,
        found=error.found,
        next_step=error.next_step,
    )


def first_difference(
    graph: WrittenGraph,
    edits: Sequence[Edit],
    model: nn.Module,
    run: Run,
    call: Callable[[], object],
    tolerance: float,
) -> str | None:
    """Name the first layer whose output differs; None if no layer's does.

    Args:
        graph: The graph.
        edits: Edits that make it comparable.
        model: The reference, with the weights that the graph has.
        run: Runs a session of the graph on some tokens.
        call: Runs the reference on these, and on what stands before them; layers that it does not
            reach are not compared.
        tolerance: Largest difference of the model's output, relative to its largest value.
    """
    proto = graph.read()
    for edit in edits:
        edit(proto)
    products = list(_products(proto.graph, model))
    values = _values(graph, edits, products, run)
    inputs, outputs, whole = _module_values(model, {m for p in products for m in p.modules}, call)
    # What goes into a router that is wrong by itself differs by roundings.
    for share in _SHARES if whole else _SHARES[:1]:
        limit = share * tolerance
        for product in products:
            if product.output not in values:
                continue
            actual = _flat(values[product.output])
            for module, piece in _pieces(product, actual, outputs):
                expected = outputs[module][-len(piece) :]
                bias = getattr(model.get_submodule(module), "bias", None)
                if product.without_bias and isinstance(bias, Tensor):
                    expected = expected - bias.detach()
                if piece.shape != expected.shape or difference(piece, expected) <= limit:
                    continue
                given = values.get(product.node.input[0])
                adds = product.node.op_type.startswith("Skip")  # its input is a sum in the node
                is_given = adds or (
                    given is not None and _alike(_flat(given), inputs[module], limit)
                )
                return _sentence(proto.graph, product.node, module, of_input=not is_given)
    return None


def _sentence(graph: onnx.GraphProto, node: onnx.NodeProto, module: str, *, of_input: bool) -> str:
    producer = {name: each for each in graph.node for name in each.output}.get(node.input[0])
    if of_input and producer is not None:
        return f"{module}: what goes into it differs (node {producer.op_type} {_name(producer)})"
    return f"{module} (node {node.op_type} {_name(node)})"


def _name(node: onnx.NodeProto) -> str:
    return node.name or node.output[0]


def _products(graph: onnx.GraphProto, model: nn.Module) -> Iterator[_Product]:
    """The nodes that read constants of modules, in the order of the graph."""
    modules = dict(model.named_modules())
    constants = {tensor.name for tensor in graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for node in graph.node:
        named = (n for n in node.input if n in constants and "." in n)
        constant = next((n for n in named if not n.endswith(".bias")), None)
        if constant is None or not any(word in node.op_type for word in _OF_MODULES):
            continue
        plain = constant
        for suffix in _SUFFIXES:
            plain = plain.removesuffix(suffix)
        owners = tuple(part.rpartition(".")[0] for part in parts_of(plain))
        if any(owner not in modules for owner in owners):
            continue
        output = node.output[0]
        after = readers.get(output, [])
        if len(after) == 1 and after[0].op_type == "Add":
            others = [n for n in after[0].input if n != output]
            if others and others[0] in constants and others[0].startswith(owners[0][:4]):
                output = after[0].output[0]
        has_bias = output != node.output[0] or any(n.endswith(".bias") for n in node.input)
        without_bias = node.op_type.startswith(_PRODUCTS) and not has_bias
        yield _Product(node, output, owners, groups_of(plain), without_bias)


def _values(
    graph: WrittenGraph, edits: Sequence[Edit], products: Sequence[_Product], run: Run
) -> dict[str, Tensor]:
    """The outputs of products and their first inputs, by name."""
    names: list[str] = []

    def add_outputs(model: onnx.ModelProto) -> None:
        made = {name for node in model.graph.node for name in node.output}
        present = {value.name for value in model.graph.output}
        wanted = [n for p in products for n in (p.node.input[0], p.output) if n in made]
        new = [n for n in dict.fromkeys(wanted) if n not in present]
        model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(n) for n in new)

    session = graph.session(*edits, add_outputs)
    names = [value.name for value in session.get_outputs()]
    arrays = run(session)
    return {
        name: torch.from_numpy(array)
        for name, array in zip(names, arrays, strict=True)
        if getattr(array, "ndim", 0) >= 2 and array.dtype.kind == "f"
    }


def _module_values(
    model: nn.Module, names: set[str], call: Callable[[], object]
) -> tuple[dict[str, Tensor], dict[str, Tensor], bool]:
    """First input and output of modules, `[T, I]` and `[T, O]`, in one run of the reference.

    And whether it came to its end: a router that is wrong stops it.
    """
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            # Heads of their own stand in another order in the graph.
            if (
                args
                and isinstance(args[0], Tensor)
                and isinstance(output, Tensor)
                and (output.dim() <= _BATCH_TOKENS_FEATURES)
            ):
                # A model may write into an output in place.
                inputs[name], outputs[name] = _flat(args[0]).clone(), _flat(output).clone()

        return hook

    handles = [
        module.register_forward_hook(keep(name))
        for name, module in model.named_modules()
        if name in names
    ]
    whole = True
    try:
        with torch.no_grad():
            call()
    except VerificationError:
        whole = False
    finally:
        for handle in handles:
            handle.remove()
    return inputs, outputs, whole


def _pieces(
    product: _Product, actual: Tensor, outputs: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The part of a product's output `[T, O]` that each of its modules computes."""
    if any(module not in outputs for module in product.modules):
        return
    if product.order is not None:
        order = row_order(*product.order)
        if len(order) == actual.shape[1]:
            actual = torch.empty_like(actual).index_copy_(1, order, actual)
    widths = [outputs[module].shape[1] for module in product.modules]
    if sum(widths) != actual.shape[1]:
        if len(widths) == 1 and actual.numel() % widths[0] == 0:
            yield product.modules[0], actual.reshape(-1, widths[0])
        return
    yield from zip(product.modules, torch.split(actual, widths, dim=1), strict=True)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().float().reshape(-1, tensor.shape[-1]) if tensor.dim() else tensor


def _alike(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    expected = expected[-len(actual) :]
    return actual.shape == expected.shape and difference(actual, expected) <= tolerance
