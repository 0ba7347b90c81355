"""An exported program as an ONNX model whose weights are recipes: nothing here reads a weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx
import onnx_ir as ir
from torch.export import ExportedProgram

from bone_fx.collector import old_objects_left_alone
from bone_fx.errors import ExportError, PassError
from bone_fx.onnx.binding import bind_recipes
from bone_fx.onnx.cleanup import clean
from bone_fx.onnx.dim_names import DimNames, name_dims
from bone_fx.onnx.kernels import CONTRIB
from bone_fx.onnx.torch_exporter import OPSET, program_to_ir
from bone_fx.weights.recipes.recipe import Recipe

IR_VERSION = 10
"""What ONNX Runtime 1.18 and later load, as onnxruntime-genai's own builder writes it."""

PRODUCER = "bone_fx"
_INTERNAL = ("bone_fx", "pkg.")
"""Domains of marks and functions that translation has to take away."""
_UNDOCUMENTED = frozenset({"SimplifiedLayerNormalization"})
"""Operators of the default domain that ONNX Runtime has and ONNX has not."""

DECOMPOSED = "bone_fx.decomposed"
"""Key of `model.meta`: why the whole program had to be decomposed; absent if it had not."""


def translate(
    program: ExportedProgram,
    recipes: Mapping[str, Recipe],
    *,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dim_names: DimNames | None = None,
    skip_norms: bool = False,
) -> ir.Model:
    """Translates a program to opset 18 and the operators of ONNX Runtime's `com.microsoft` domain.

    Args:
        program: From `torch.export`; its parameters may be fake. Nodes of `torch.onnx.ops.symbolic`
            are kept.
        recipes: Name of a parameter or buffer -> where its bytes come from. Constants of the trace
            that have a value of their own need none.
        input_names: Names of the tensor inputs, in the program's order.
        output_names: Names of the outputs, in the program's order.
        dim_names: Names of the dynamic dimensions of inputs and outputs.
        skip_norms: Whether to join residual additions and layer norms, which pays on CUDA only.

    Returns:
        A model whose initializers are lazy, without metadata, the same for the same program.

    Raises:
        ExportError: An operator has no translation, or a constant no bytes.
        PassError: An operator of another domain is left.
        CaptureError: A dimension named in `dim_names` is not dynamic in the program.
    """
    with old_objects_left_alone():
        model, decomposed = program_to_ir(program)
    _separate_outputs(model.graph)
    bind_recipes(model, recipes)
    _rename(model.graph.inputs, input_names, "inputs")
    _rename(model.graph.outputs, output_names, "outputs")
    name_dims(model, dim_names or {})
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = PRODUCER, None
    model.graph.opset_imports[""] = OPSET
    clean(model, skip_norms=skip_norms)
    verify_operators(model)
    if decomposed is not None:
        model.meta[DECOMPOSED] = decomposed
    return model


def verify_operators(model: ir.Model) -> None:
    """Check that only operators of the opset, of ONNX Runtime and of the user's own domains stand.

    Raises:
        PassError: One of this package or of PyTorch, or one that the opset lacks; the message names
            the node.
    """
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        standard = not node.domain and (
            node.op_type in _UNDOCUMENTED or onnx.defs.has(node.op_type, OPSET)
        )
        foreign = not node.domain or node.domain.startswith(_INTERNAL)
        if foreign and not standard:
            raise PassError(
                f"after translation node {node.name} is {node.domain}::{node.op_type}",
                expected=f"operators of opset {OPSET}, of {CONTRIB} or of a user's domain",
            )


def _rename(values: Sequence[ir.Value], names: Sequence[str] | None, what: str) -> None:
    if names is None:
        return
    if len(names) != len(values) or len(set(names)) != len(names):
        raise ExportError(
            f"the program has other {what} than it was given names for",
            expected=list(names),
            found=[value.name for value in values],
        )
    for value, name in zip(values, names, strict=True):
        value.name = name


def _separate_outputs(graph: ir.Graph) -> None:
    """Gives an output that is an input, a constant or another output too a node of its own."""
    seen: set[ir.Value] = set()
    for place, value in enumerate(list(graph.outputs)):
        if value in seen or value.is_graph_input() or value.is_initializer():
            node = ir.node(
                "Identity", [value], outputs=[ir.Value(name=f"{value.name}_copy_{place}")]
            )
            copy = node.outputs[0]
            copy.shape, copy.type = value.shape, value.type
            graph.append(node)
            graph.outputs[place] = copy
        seen.add(value)
