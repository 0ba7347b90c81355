"""A written graph as verification runs it: whole, without rounded activations, or cut."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from bone_fx.runtime.session import open_session

if TYPE_CHECKING:
    import onnxruntime

Edit = Callable[[onnx.ModelProto], None]
_EDITED = ".edited.onnx"
"""Behind the name of a graph, where no other file of an export is: it has two dots."""
_LEVEL = "accuracy_level"
_FLOAT32_LEVEL = 1
_QMOE_SCALES = (3, 6)


@dataclass(frozen=True)
class WrittenGraph:
    """A model file with its data beside it.

    Attributes:
        path: The file, `model.onnx` or that of a variant.
        provider: ONNX Runtime's provider to run it on, `"cpu"` or `"cuda"`.
        edits: What is changed of it before anything else; it is a twin that runs.
    """

    path: Path
    provider: str
    edits: tuple[Edit, ...] = ()

    def read(self) -> onnx.ModelProto:
        """The model without the bytes of its constants."""
        return onnx.load(self.path, load_external_data=False)

    def rounds_activations(self) -> bool:
        """Whether a product rounds its activations to int8."""
        nodes = self.read().graph.node
        told = any(a.name == _LEVEL for node in nodes for a in node.attribute)
        return told or (self.provider == "cpu" and any(map(_is_8_bit_mixture, nodes)))

    def shares_a_buffer(self) -> bool:
        """Whether attention is the operator in every layer, which takes a cache of fixed size."""
        graph = self.read().graph
        layers = sum(value.name.endswith(".key") for value in graph.input)
        fused = sum(node.op_type == "GroupQueryAttention" for node in graph.node)
        return bool(fused == layers)

    def session(self, *edits: Edit) -> onnxruntime.InferenceSession:
        """A session of the model, or of a copy that was edited.

        The copy's file lies beside the data, and is gone when this returns.
        """
        edits = (*self.edits, *edits)
        if not edits:
            return open_session(self.path, self.provider)
        model = self.read()
        for edit in edits:
            edit(model)
        edited = self.path.with_name(self.path.stem + _EDITED)
        try:
            edited.write_bytes(model.SerializeToString())
            return open_session(edited, self.provider, quiet=True)
        finally:
            edited.unlink(missing_ok=True)


def keep_activations(model: onnx.ModelProto) -> None:
    """Let every product take its activations as they are, not rounded to int8.

    QMoE's kernel for the CPU (ONNX Runtime 1.31) rounds them at every level where weights have 8
    bits, unless their scales might be given anew in every run.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    inputs = {value.name for value in model.graph.input}
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == _LEVEL:
                attribute.i = _FLOAT32_LEVEL
        if not _is_8_bit_mixture(node):
            continue
        for name in (node.input[place] for place in _QMOE_SCALES):
            if name not in inputs:
                tensor = constants[name]
                dims = list(tensor.dims)
                model.graph.input.append(
                    onnx.helper.make_tensor_value_info(name, tensor.data_type, dims)
                )
                inputs.add(name)


def _is_8_bit_mixture(node: onnx.NodeProto) -> bool:
    bits = {a.name: a.i for a in node.attribute if a.name == "expert_weight_bits"}
    return node.op_type == "QMoE" and bits == {"expert_weight_bits": 8}


def cut_at(names: Iterable[str]) -> Edit:
    """An edit that leaves only what some values are computed from, and makes them the outputs."""
    wanted = list(dict.fromkeys(names))

    def edit(model: onnx.ModelProto) -> None:
        graph = model.graph
        needed, nodes = set(wanted), []
        for node in reversed(graph.node):
            if needed.intersection(node.output):
                needed.update(node.input)
                nodes.append(node)
        presents = [o for o in graph.output if o.name in {n for x in nodes for n in x.output}]
        others = [onnx.helper.make_empty_tensor_value_info(n) for n in wanted]
        outputs = [*others, *(o for o in presents if o.name not in wanted)]
        kept = {
            "node": nodes[::-1],
            "initializer": [t for t in graph.initializer if t.name in needed],
            "input": [i for i in graph.input if i.name in needed],
            "output": outputs,
        }
        for field, values in kept.items():
            copies = [type(value).FromString(value.SerializeToString()) for value in values]
            del getattr(graph, field)[:]
            getattr(graph, field).extend(copies)

    return edit


def tensor_of(value: ir.TensorProtocol) -> Tensor:
    """The content of a constant; of a file only what is asked for is in memory."""
    content = value.numpy().copy()
    if isinstance(value, ir.ExternalTensor):
        value.release()
    if value.dtype == ir.DataType.BFLOAT16:  # NumPy has no such dtype
        return torch.from_numpy(content.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(content)
