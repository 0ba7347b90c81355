"""Seeding a defect into a written folder: a node, a constant, a field, the tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper


@contextmanager
def graph_of(folder: Path) -> Iterator[onnx.GraphProto]:
    """The graph of a folder, which is written back."""
    path = folder / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    yield model.graph
    path.write_bytes(model.SerializeToString())


def nodes(graph: onnx.GraphProto, *kinds: str) -> list[onnx.NodeProto]:
    """The nodes whose operator's name holds one of some words."""
    return [node for node in graph.node if any(kind in node.op_type for kind in kinds)]


def attribute(kind: str, place: int, name: str, change: Callable[[Any], Any]) -> Any:
    """A defect: an attribute of a node of a kind has another value."""

    def seed(folder: Path) -> None:
        with graph_of(folder) as graph:
            node = nodes(graph, kind)[place]
            for each in node.attribute:
                if each.name == name:
                    value = onnx.helper.get_attribute_value(each)
                    each.CopyFrom(onnx.helper.make_attribute(name, change(value)))
                    return
            node.attribute.append(onnx.helper.make_attribute(name, change(None)))

    return seed


def operator(kind: str, place: int, new: str) -> Any:
    """A defect: a node computes something else."""

    def seed(folder: Path) -> None:
        with graph_of(folder) as graph:
            nodes(graph, kind)[place].op_type = new

    return seed


def exchange_attributes(kind: str, first: int, second: int) -> Any:
    """A defect: two nodes have each other's attributes, as layers of two kinds exchanged."""

    def seed(folder: Path) -> None:
        with graph_of(folder) as graph:
            one, other = (nodes(graph, kind)[place] for place in (first, second))
            kept = list(one.attribute)
            del one.attribute[:]
            one.attribute.extend(other.attribute)
            del other.attribute[:]
            other.attribute.extend(kept)

    return seed


def exchange_inputs(kind: str, place: int, first: int, second: int) -> Any:
    """A defect: a node has two of its inputs exchanged."""

    def seed(folder: Path) -> None:
        with graph_of(folder) as graph:
            inputs = nodes(graph, kind)[place].input
            inputs[first], inputs[second] = inputs[second], inputs[first]

    return seed


def insert(
    kind: str, place: int, index: int, operator: str, array: np.ndarray, **attributes: Any
) -> Any:
    """A defect: an input of a node goes through an operator with a constant before."""

    def seed(folder: Path) -> None:
        with graph_of(folder) as graph:
            node = nodes(graph, kind)[place]
            graph.initializer.append(numpy_helper.from_array(array, "seeded_constant"))
            given = [node.input[index], "seeded_constant"]
            new = onnx.helper.make_node(operator, given, ["seeded_value"], **attributes)
            node.input[index] = "seeded_value"
            kept = list(graph.node)
            kept.insert(kept.index(node), new)
            del graph.node[:]
            graph.node.extend(kept)

    return seed


def rename_input(old: str, new: str, of_kind: str, place: int) -> Any:
    """A defect: a node reads another value."""

    def seed(folder: Path) -> None:
        with graph_of(folder) as graph:
            node = nodes(graph, of_kind)[place]
            node.input[:] = [new if name == old else name for name in node.input]

    return seed


def ignore_the_mask(folder: Path) -> None:
    """A defect: every row is taken to be as long as the longest."""
    with graph_of(folder) as graph:
        total = nodes(graph, "ReduceSum")[0]
        ones = onnx.helper.make_tensor("value", onnx.TensorProto.INT64, [1], [1])
        new = [
            onnx.helper.make_node("Shape", ["attention_mask"], ["mask_shape"]),
            onnx.helper.make_node("ConstantOfShape", ["mask_shape"], ["mask_ones"], value=ones),
        ]
        total.input[0] = "mask_ones"
        kept = list(graph.node)
        del graph.node[:]
        graph.node.extend([*new, *kept])


# Constants.


def constant(name: str, change: Callable[[np.ndarray], Any]) -> Any:
    """A defect: a constant has other values; a name may begin with a star."""

    def seed(folder: Path) -> None:
        with graph_of(folder) as graph:
            matching = (t for t in graph.initializer if _matches(t.name, name))
            if (tensor := next(matching, None)) is None:
                raise SystemExit(f"no constant {name} in {[t.name for t in graph.initializer]}")
            array = numpy_helper.to_array(tensor, base_dir=str(folder)).copy()
            changed = change(array)
            array = array if changed is None else np.ascontiguousarray(changed)
            _write(folder, tensor, array)

    return seed


def exchange_constants(first: str, second: str) -> Any:
    """A defect: two constants have each other's values."""

    def seed(folder: Path) -> None:
        with graph_of(folder) as graph:
            tensors = {t.name: t for t in graph.initializer}
            one, other = tensors[first], tensors[second]
            arrays = [numpy_helper.to_array(t, base_dir=str(folder)).copy() for t in (one, other)]
            _write(folder, one, arrays[1])
            _write(folder, other, arrays[0])

    return seed


def _matches(name: str, wanted: str) -> bool:
    return name.endswith(wanted[1:]) if wanted.startswith("*") else name == wanted


def _write(folder: Path, tensor: onnx.TensorProto, array: np.ndarray) -> None:
    """Put values in the place of a tensor's, in its file or in the graph."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if not entries:
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
        return
    with (folder / entries["location"]).open("r+b") as file:
        file.seek(int(entries.get("offset", 0)))
        file.write(array.tobytes())


def add_at(index: Any, value: float) -> Callable[[np.ndarray], None]:
    """A change of one value, or of some."""

    def change(array: np.ndarray) -> None:
        array[index] += np.asarray(value, array.dtype)

    return change


def add_bits(index: Any, bits: int) -> Callable[[np.ndarray], None]:
    """A change of some bits of one value of whole numbers."""

    def change(array: np.ndarray) -> None:
        array[index] ^= bits

    return change


# Files beside the graph.


def field(name: str, value: Any) -> Any:
    """A defect: a field of genai_config.json, by its path, has another value."""

    def seed(folder: Path) -> None:
        path = folder / "genai_config.json"
        content = json.loads(path.read_text())
        *parents, last = name.split(".")
        place = content
        for parent in parents:
            place = place[parent]
        place[last] = value(place.get(last)) if callable(value) else value
        path.write_text(json.dumps(content))

    return seed


def tokenizer(change: Callable[[Any], None]) -> Any:
    """A defect: another tokenizer."""

    def seed(folder: Path) -> None:
        path = folder / "tokenizer.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return seed


def exchange_tokens(content: Any) -> None:
    """Give two tokens each other's ids."""
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[20:22]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]


def other_template(folder: Path) -> None:
    """Another chat template."""
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text() + "x")
