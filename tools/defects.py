"""Seeded defects: what verification finds, where it says that they are, and false alarms.

Tiny models of many architectures are exported without verification; each defect is put into a copy
of the written folder (a node's attribute, a byte of a weight, a field, the tokenizer), and the
verification of the export is run on it. A defect in a layer must be named with its layer, one
beside the graph with its file and field.

    python tools/defects.py                    # every defect
    python tools/defects.py window rope        # those whose names hold a word
    python tools/defects.py --clean            # no defect: 15 architectures in four dtypes
    python tools/defects.py --json

Exits with 1 if a defect is published, or an export without one is refused.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from operator import add
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from rich.console import Console
from rich.table import Table

import bone_fx
from bone_fx.adapter_folder import read_adapters
from bone_fx.deploy.checkpoint_inputs import open_checkpoint
from bone_fx.deploy.earlier_output import read_manifest
from bone_fx.deploy.verification import verify_checkpoint
from bone_fx.deploy.verify_export import exported_of
from bone_fx.errors import BoneFxError, VerificationError
from bone_fx.runtime.session import open_session
from bone_fx.verify.parity import TOLERANCE, difference

sys.path.insert(0, str(Path(__file__).parents[1]))
_decoders: Any = import_module("tests.capture.decoder.decoders")
_architectures: Any = import_module("tests.capture.architectures")
_tiny: Any = import_module("tests.end_to_end.tiny")

CLEAN = (
    *("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox"),
    *("opt", "falcon_new", "cohere", "olmo2", "stablelm", "mixtral"),
)
CLEAN_DTYPES = ("fp32", "fp16", "int4", "bf16")
PUBLISHED, CAUGHT, NAMED, SMALL = "published", "caught", "named", "below tolerance"


@dataclass(frozen=True)
class Defect:
    """One seeded defect.

    Attributes:
        name: What is wrong.
        model: Row of the tests' tables, or `tiny` for a Llama with an adapter and a tokenizer.
        seed: Damages a folder.
        names: What the message must hold: a layer, or a file and a field.
        dtype: Dtype of the export.
    """

    name: str
    model: str
    seed: Callable[[Path], None]
    names: tuple[str, ...]
    dtype: str = "fp32"


# Graphs.


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


EPSILON = ("epsilon", lambda _: 3e-2)
GQA = "GroupQueryAttention"
GENAI = "genai_config.json"
K_PROJ = "model.layers.1.self_attn.q_proj+k_proj+v_proj.weight"


def _epsilons() -> list[Defect]:
    rows = {"llama": (3, "layers.1."), "gemma2": (2, "layers.0."), "gpt2": (2, "h.1.")}
    rows |= {"gpt_neox": (3, "layers.1."), "qwen3": (2, "layers.0."), "falcon_new": (2, "h.1.")}
    return [
        Defect("norm epsilon", model, attribute("Norm", place, *EPSILON), (layer,))
        for model, (place, layer) in rows.items()
    ]


def _attention() -> list[Defect]:
    def scaled(scale: float) -> float:
        return scale * 1.05

    defects = [
        Defect("attention scale", model, attribute(GQA, 1, "scale", scaled), (layer,))
        for model, layer in (
            *(("llama", "layers.1."), ("gpt2", "h.1."), ("opt", "layers.1.")),
            *(("gemma3_text", "layers.1."), ("cohere", "layers.1."), ("phi3", "layers.1.")),
        )
    ]
    windows = {"mistral": "layers.0.", "gemma3_text": "layers.0.", "gpt_oss": "layers.0."}
    for model, layer in windows.items():
        for change, by in (("narrower", -1), ("wider", 1)):
            seed = attribute(GQA, 0, "local_window_size", partial(add, by))
            defects.append(Defect(f"window one {change}", model, seed, (layer,)))
    return [
        *defects,
        Defect("window where there is none", "llama",
               attribute(GQA, 0, "local_window_size", lambda _: 40), ("layers.0.",)),
        Defect("no window", "mistral",
               attribute(GQA, 1, "local_window_size", lambda _: -1), ("layers.1.",)),
        Defect("layer types exchanged", "gemma3_text", exchange_attributes(GQA, 0, 1),
               ("layers.0.",)),
        Defect("layer types exchanged", "gpt_oss", exchange_attributes(GQA, 0, 1), ("layers.0.",)),
        Defect("rotary pairs interleaved", "llama",
               attribute(GQA, 1, "rotary_interleaved", lambda _: 1), ("layers.1.",)),
        Defect("rotary pairs not interleaved", "cohere",
               attribute(GQA, 0, "rotary_interleaved", lambda _: 0), ("layers.0.",)),
        Defect("softcap", "gemma2", attribute(GQA, 1, "softcap", lambda s: s * 0.5),
               ("layers.1.",)),
        Defect("rotary table of another layer type", "gemma3_text",
               rename_input("cos_cache", "cos_cache_1", GQA, 0), ("layers.0.",)),
        Defect("mask ignored", "llama", ignore_the_mask, ()),
    ]  # fmt: skip


def _tables() -> list[Defect]:
    beyond = add_at(slice(80, None), 0.5)
    return [
        Defect("rotary table beyond the prompt", model, constant(table, beyond), (table,))
        for model in ("llama", "qwen3_yarn", "gemma3_text")
        for table in ("cos_cache", "sin_cache")
    ] + [
        Defect("rotary table, one value", "phi3", constant("cos_cache", add_at((95, 3), 1e-3)),
               ("cos_cache", "95")),
        Defect("table of long texts", "phi3_longrope_short",
               constant("cos_cache", add_at((-3, 0), 0.5)), ("layers.0.",)),
        Defect("rotary table in fp16", "llama", constant("cos_cache", add_at((90, 1), 0.25)),
               ("cos_cache", "90"), "fp16"),
        Defect("learned positions beyond the prompt", "gpt2",
               constant("transformer.wpe.weight", add_at((90, 3), 1e-2)), ("wpe",)),
        Defect("learned positions beyond the prompt", "opt",
               constant("model.decoder.embed_positions.weight", add_at((90, 3), 1e-2)),
               ("embed_positions",)),
    ]  # fmt: skip


def _weights() -> list[Defect]:
    last = add_at((1, 2), 1e-4)
    plain = {
        ("llama", "model.layers.1.mlp.down_proj.weight"): "layers.1.mlp.down_proj",
        ("llama", "model.layers.0.self_attn.o_proj.weight"): "layers.0.self_attn.o_proj",
        ("llama", "lm_head.weight"): "lm_head",
        ("gpt2", "transformer.h.1.mlp.c_fc.weight"): "h.1.mlp.c_fc",
        ("qwen3_moe", "model.layers.1.mlp.gate.weight"): "layers.1.mlp.gate",
        ("bert", "*layer.1.output.dense.weight"): "layer.1.output.dense",
        ("vit", "*layers.1.mlp.fc2.weight"): "layers.1.mlp.fc2",
    }
    defects = [
        Defect("unadapted weight, one value", model, constant(name, last), (layer,))
        for (model, name), layer in plain.items()
    ]
    vectors = {
        ("llama", "model.layers.1.post_attention_layernorm.weight"): "layers.1.post_attention",
        ("llama_bias", "model.layers.0.mlp.down_proj.bias"): "layers.0.mlp.down_proj",
        ("gpt2", "transformer.h.0.attn.c_attn.bias"): "h.0.attn.c_attn",
        ("gemma2", "model.layers.1.input_layernorm.weight_plus_one"): "layers.1.input_layernorm",
        ("bert", "*layer.0.attention.output.LayerNorm.weight"): "layer.0.attention.output",
    }
    defects += [
        Defect("norm or bias, one value", model, constant(name, add_at(-1, 1e-4)), (layer,))
        for (model, name), layer in vectors.items()
    ]
    return [
        *defects,
        Defect("embedding row that no token reads", "llama",
               constant("model.embed_tokens.weight", add_at((57, 3), 1e-3)), ("embed_tokens",)),
        Defect("embedding row that no token reads", "bert",
               constant("*predictions.decoder.weight", add_at((57, 3), 1e-3)), ("decoder",)),
        Defect("a value of q, k or v", "tiny", constant(K_PROJ, add_at((5, 60), 1e-3)),
               ("layers.1.self_attn.k_proj",)),
        Defect("layers exchanged", "llama",
               exchange_constants("model.layers.0.mlp.down_proj.weight",
                                  "model.layers.1.mlp.down_proj.weight"), ("mlp.down_proj",)),
        Defect("weight not transposed", "llama",
               constant("model.layers.0.self_attn.o_proj.weight", lambda w: -w),
               ("layers.0.self_attn.o_proj",)),
        Defect("a weight of fp16, last bit", "llama",
               constant("model.layers.0.mlp.down_proj.weight",
                        lambda w: np.nextafter(w, np.float16(1), dtype=np.float16)),
               ("layers.0.mlp.down_proj",), "fp16"),
        Defect("scale of a block", "llama",
               constant("model.layers.1.mlp.down_proj.weight.scales", lambda s: s * 1.5),
               ("layers.1.mlp.down_proj",), "int4"),
        Defect("a code", "llama",
               constant("model.layers.0.mlp.down_proj.weight.codes", add_bits((3, 1, 2), 0x0C)),
               ("layers.0.mlp.down_proj",), "int4"),
        Defect("zero point", "llama",
               constant("model.layers.0.self_attn.o_proj.weight.zero_points",
                        add_bits((7, 0), 0x07)),
               ("layers.0.self_attn.o_proj",), "int4"),
    ]  # fmt: skip


def _computations() -> list[Defect]:
    return [
        Defect("another activation", "llama", operator("Sigmoid", 1, "Tanh"), ("layers.1.mlp",)),
        Defect("another activation", "qwen3", operator("Sigmoid", 0, "Tanh"), ("layers.0.mlp",)),
        Defect("gelu of another kind", "bert",
               operator("BiasGelu", 0, "FastGelu"), ("layer.0",)),
        Defect("clipped experts", "gpt_oss", attribute("MoE", 1, "swiglu_limit", lambda _: 0.1),
               ("layers.1.mlp",)),
        Defect("experts' activation", "gpt_oss",
               attribute("MoE", 0, "activation_alpha", lambda a: a * 1.2), ("layers.0.mlp",)),
        Defect("fewer experts", "qwen3_moe", attribute("MoE", 1, "k", lambda _: 1),
               ("layers.1.mlp",)),
        Defect("logits scaled", "cohere",
               constant("constant_2", lambda c: c * np.float32(1.1)), ()),
    ]  # fmt: skip


def _beside() -> list[Defect]:
    fields: dict[str, Any] = {
        "model.decoder.head_size": lambda n: n + 8,
        "model.decoder.num_key_value_heads": lambda n: n * 2,
        "model.decoder.num_hidden_layers": lambda n: n - 1,
        "model.decoder.num_attention_heads": lambda n: n + 1,
        "model.decoder.hidden_size": lambda n: n * 2,
        "model.decoder.filename": "other.onnx",
        "model.decoder.inputs.past_key_names": "past.%d.key",
        "model.decoder.outputs.logits": "scores",
        "model.vocab_size": lambda n: n + 1,
        "model.context_length": lambda n: n * 4,
        "model.eos_token_id": lambda n: (n or 0) + 3,
        "model.bos_token_id": lambda n: (n or 0) + 3,
        "model.pad_token_id": lambda n: (n or 0) + 3,
        "search.max_length": lambda n: n * 4,
    }
    return [
        *(
            Defect(f"{GENAI}: {name}", "tiny", field(name, value), (GENAI, name.split(".")[-1]))
            for name, value in fields.items()
            if ".inputs." not in name and ".outputs." not in name
        ),
        Defect(f"{GENAI}: names of the past", "tiny",
               field("model.decoder.inputs.past_key_names", "past.%d.key"), (GENAI, "inputs")),
        Defect(f"{GENAI}: name of the logits", "tiny",
               field("model.decoder.outputs.logits", "scores"), (GENAI, "outputs")),
        Defect("another tokenizer", "tiny", tokenizer(exchange_tokens), ("tokenizer.json",)),
        Defect("a token that is gone", "tiny",
               tokenizer(lambda c: c["added_tokens"].pop()), ("tokenizer.json",)),
        Defect("another chat template", "tiny", other_template, ("chat template",)),
    ]  # fmt: skip


DEFECTS = [
    *_epsilons(),
    *_attention(),
    *_tables(),
    *_weights(),
    *_computations(),
    *_beside(),
]


class Exports:
    """Exports of the tables' models without verification, each made once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[tuple[str, str], tuple[Path, Path, list[Path]]] = {}

    def of(self, model: str, dtype: str) -> tuple[Path, Path, list[Path]]:
        """Output, base and adapters of a model in a dtype."""
        key = model, dtype
        if key not in self._made:
            place = self._folder / f"{model}-{dtype}"
            base, adapters = self._inputs(model, place)
            provider: Any = "cuda" if dtype == "bf16" else "cpu"
            bone_fx.export(
                base,
                output=place / "out",
                adapters=adapters,
                dtype=dtype,  # type: ignore[arg-type]
                provider=provider,
                verify="off",
            )
            self._made[key] = place / "out", base, adapters
        return self._made[key]

    def _inputs(self, model: str, place: Path) -> tuple[Path, list[Path]]:
        if model == "tiny":
            base = _tiny.tiny_base(place / "base")
            _tiny.tiny_tokenizer(base)
            return base, [_tiny.tiny_adapter(place / "adapter")]
        rows = {row.name: row for row in (*_architectures.ARCHITECTURES, *_decoders.DECODERS)}
        rows[model].build().save_pretrained(place / "base")
        return place / "base", []


def verify(folder: Path, base: Path, adapters: list[Path]) -> None:
    """The verification of an export, without the hashes of its manifest."""
    manifest = read_manifest(folder)
    assert manifest is not None
    inputs = open_checkpoint(base, read_adapters(adapters), trust_remote_code=False, revision=None)
    verify_checkpoint(exported_of(folder, manifest, inputs, "cpu"), inputs, "cpu", "full")


def result_of(defect: Defect, exports: Exports, place: Path) -> tuple[str, str]:
    """Whether a defect is published, caught or named, and the message."""
    out, base, adapters = exports.of(defect.model, defect.dtype)
    folder = place / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(out, folder)
    defect.seed(folder)
    try:
        verify(folder, base, adapters)
    except VerificationError as error:
        message = " ".join(str(error).split())
        return NAMED if all(name in message for name in defect.names) else CAUGHT, message
    except BoneFxError as error:
        return CAUGHT, " ".join(str(error).split())
    effect = effect_of(out, folder)
    if effect <= TOLERANCE["fp32"]:
        return SMALL, f"it changes the outputs by {effect:.2g} of the largest value"
    return PUBLISHED, f"it changes the outputs by {effect:.2g} of the largest value"


def effect_of(out: Path, damaged: Path) -> float:
    """How far a defect moves the outputs of the graph on random tokens or pixels."""
    generator = np.random.default_rng(0)
    kinds = {"tensor(int64)": np.int64, "tensor(float)": np.float32, "tensor(float16)": np.float16}
    sizes = {"batch": 2, "batch_size": 2}
    feeds: dict[str, Any] = {}
    outputs = []
    for folder in (out, damaged):
        session = open_session(folder / "model.onnx")
        for value in session.get_inputs():
            is_past = value.name.startswith("past_key_values.")
            other = 0 if is_past else 16
            shape = [sizes.get(d, other) if isinstance(d, str) else d for d in value.shape]
            dtype = kinds[value.type]
            array: Any
            if "mask" in value.name:
                array = np.ones(shape)
            elif np.issubdtype(dtype, np.integer):
                array = generator.integers(3, 90, shape)
            else:
                array = generator.normal(size=shape)
            feeds.setdefault(value.name, array.astype(dtype))
        outputs.append(session.run(None, feeds)[0])
    sound, changed = (torch.from_numpy(output) for output in outputs)
    return difference(changed, sound)


def clean(names: list[str]) -> Iterator[tuple[str, str, str]]:
    """Exports without a defect: model, dtype, and what was wrong with it."""
    for model in CLEAN:
        for dtype in CLEAN_DTYPES:
            if names and not any(name in model for name in names):
                continue
            with TemporaryDirectory() as folder:
                rows = {row.name: row for row in _decoders.DECODERS}
                rows[model].build().save_pretrained(Path(folder) / "base")
                provider: Any = "cuda" if dtype == "bf16" else "cpu"
                wrong = ""
                try:
                    bone_fx.export(
                        Path(folder) / "base",
                        output=Path(folder) / "out",
                        dtype=dtype,  # type: ignore[arg-type]
                        provider=provider,
                        verify_on="cpu",
                    )
                except BoneFxError as error:
                    wrong = " ".join(str(error).split())
                yield model, dtype, wrong


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", help="words of the defects' or models' names")
    parser.add_argument("--clean", action="store_true", help="exports without a defect")
    parser.add_argument("--json", action="store_true", dest="as_json")
    options = parser.parse_args()
    table = Table("model", "dtype", "defect", "result", "message")
    results: list[dict[str, Any]] = []
    show = Console(width=200)
    if options.clean:
        for model, dtype, wrong in clean(options.names):
            result = "false alarm" if wrong else "published"
            results.append({"model": model, "dtype": dtype, "result": result, "message": wrong})
    with TemporaryDirectory() as folder:
        exports = Exports(Path(folder))
        chosen = [d for d in DEFECTS if not options.clean]
        for defect in chosen:
            if options.names and not any(name in defect.name for name in options.names):
                continue
            start = time.perf_counter()
            result, message = result_of(defect, exports, Path(folder))
            print(
                f"{defect.model:20} {defect.dtype:5} {defect.name:40} {result}"
                f" {time.perf_counter() - start:.1f} s",
                file=sys.stderr,
            )
            results.append(
                {"model": defect.model, "dtype": defect.dtype, "defect": defect.name,
                 "result": result, "message": message}
            )  # fmt: skip
    for row in results:
        table.add_row(*(str(row.get(c, "")) for c in ("model", "dtype", "defect", "result")),
                      row["message"][:110])  # fmt: skip
    counts = {r: sum(x["result"] == r for x in results) for r in {x["result"] for x in results}}
    if options.as_json:
        print(json.dumps({"results": results, "counts": counts}, indent=1))
    else:
        show.print(table)
        show.print(counts)
    bad = "false alarm" if options.clean else PUBLISHED
    sys.exit(1 if counts.get(bad) else 0)


if __name__ == "__main__":
    main()
