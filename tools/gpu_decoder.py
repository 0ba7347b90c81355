"""A decoder in ONNX Runtime alone, run as onnxruntime-genai runs it, on the CPU or on CUDA.

Shape letters: B batch, S new tokens, K key/value heads, C capacity of the cache, D head size, V
vocabulary.
"""

from __future__ import annotations

import ctypes
import resource
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort

NUMPY: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(bfloat16)": ml_dtypes.bfloat16,
    "tensor(float8e4m3fn)": ml_dtypes.float8_e4m3fn,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(int64)": np.int64,
}
_WITHOUT_NUMPY = {
    ml_dtypes.bfloat16: (onnx.TensorProto.BFLOAT16, np.uint16),
    ml_dtypes.float8_e4m3fn: (onnx.TensorProto.FLOAT8E4M3FN, np.uint8),
}
"""What ONNX Runtime takes as bits alone: its own name for it, and NumPy's integer of the size."""
_BLOCK = 1 << 22
RANDOM = "random-weights"
"""An empty file beside data that `fill_at_random` wrote."""


class _Cuda:
    """What the CUDA runtime that ONNX Runtime loaded is asked beside it."""

    def require(self) -> None:
        """Load the libraries.

        Raises:
            SystemExit: There is no CUDA provider, or no device, here.
        """
        if hasattr(ort, "preload_dlls"):
            ort.preload_dlls()
        try:
            self.memory()
        except OSError as error:
            raise SystemExit(
                f"no CUDA here ({error}); install bone_fx[gpu], or pass --provider cpu"
            ) from error

    def memory(self) -> int:
        """Bytes of the device that are in use, by anyone."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return total.value - free.value

    def read(self, address: int, size: int) -> bytes:
        """Bytes of the device."""
        buffer = ctypes.create_string_buffer(size)
        to_host = 2
        self._call("cudaMemcpy", buffer, ctypes.c_void_p(address), ctypes.c_size_t(size), to_host)
        return buffer.raw

    def name(self) -> str:
        """Of the card."""
        buffer = ctypes.create_string_buffer(4096)  # cudaDeviceProp begins with the name
        self._call("cudaGetDeviceProperties", buffer, 0)
        return buffer.value.decode()

    def _call(self, function: str, *arguments: Any) -> None:
        status = getattr(self._library(), function)(*arguments)
        if status:
            raise OSError(f"{function} gives {status}")

    def _library(self) -> ctypes.CDLL:
        for version in (13, 12):
            try:
                return ctypes.CDLL(f"libcudart.so.{version}")
            except OSError:
                continue
        raise OSError("no libcudart")


CUDA = _Cuda()


def device_memory(provider: str) -> int:
    """Bytes in use: of the device, or of this process at its peak."""
    if provider == "cuda":
        return CUDA.memory()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Decoder:
    """A session with its inputs and outputs bound, and one buffer for past and present.

    Args:
        path: `model.onnx`, or the graph of a variant.
        provider: `cuda` or `cpu`.
        graph: Whether steps are fed as CUDA graphs need it, with a mask as wide as the cache; on
            CUDA they are captured and replayed.
        entries: Entries of the session's configuration.
    """

    def __init__(self, path: Path, provider: str, graph: bool, entries: dict[str, str]) -> None:
        self.provider, self.graph = provider, graph
        options = ort.SessionOptions()
        options.log_severity_level = 3
        for key, value in entries.items():
            options.add_session_config_entry(key, value)
        if provider == "cuda":
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        providers: list[Any] = ["CPUExecutionProvider"]
        if provider == "cuda":
            captures = {"enable_cuda_graph": str(int(graph))}
            providers.insert(0, ("CUDAExecutionProvider", captures))
        self.session = ort.InferenceSession(str(path), options, providers=providers)
        if self.session.get_providers()[0] != f"{provider.upper()}ExecutionProvider":
            raise OSError(f"the session fell back to {self.session.get_providers()[0]}")
        nodes = onnx.load(path, load_external_data=False).graph.node
        self.rounds_activations = any(
            a.name == "accuracy_level" and a.i == 4 for node in nodes for a in node.attribute
        )
        self.bytes = path.stat().st_size
        self.bytes += sum(file.stat().st_size for file in path.parent.glob("*.data"))
        self._inputs = {value.name: value for value in self.session.get_inputs()}
        logits = next(value for value in self.session.get_outputs() if value.name == "logits")
        self.dtype, self.vocabulary = logits.type, int(logits.shape[2])
        self._only_last = logits.shape[1] == 1
        past = [name for name in self._inputs if name.startswith("past_key_values.")]
        fused = sum(node.op_type == "GroupQueryAttention" for node in nodes)
        self._shares = 2 * fused == len(past)
        if graph and not self._shares:
            raise OSError("the cache grows from step to step: no CUDA graph")
        kept = {self._inputs[name].type for name in past}
        self.rounds_cache = bool(kept & {"tensor(int8)", "tensor(float8e4m3fn)"})
        self.runs_on_cpu = not {self.dtype, *kept} & {"tensor(bfloat16)", "tensor(float8e4m3fn)"}
        self._past = past
        self._cache: dict[str, ort.OrtValue] = {}
        self._bound: dict[int, tuple[Any, dict[str, ort.OrtValue]]] = {}
        self._shape, self._done, self._captures = (0, 0), 0, 0

    def begin(self, batch: int, capacity: int) -> None:
        """A new text of at most `capacity` tokens a row; buffers of the same size are kept."""
        self._done = 0
        if self._shape != (batch, capacity) or not self._shares:
            self._shape = (batch, capacity)
            self._captures += 1  # a graph holds the addresses of its buffers
            self._bound.clear()
            length = capacity if self._shares else 0
            for name in self._past:
                value = self._inputs[name]
                shape = (batch, value.shape[1], length, value.shape[3])
                self._cache[name] = self._value(np.zeros(shape, NUMPY[value.type]))

    def step(self, ids_BS: np.ndarray) -> np.ndarray:
        """Logits `[B, V]` of the last of some new tokens, in float32."""
        batch, new = ids_BS.shape
        self._done += new
        # Attention takes a wide mask for several new tokens of one row only; steps are captured.
        is_wide = self.graph and (new == 1 or batch == 1)
        width = self._shape[1] if is_wide else self._done
        mask = np.zeros((batch, width), np.int64)
        mask[:, : self._done] = 1
        binding, values = self._binding(ids_BS, mask)
        values["input_ids"].update_inplace(ids_BS)
        values["attention_mask"].update_inplace(mask)
        run = ort.RunOptions()
        if self.graph and self.provider == "cuda":
            run.add_run_config_entry("gpu_graph_id", str(self._captures if new == 1 else -1))
        self.session.run_with_iobinding(binding, run)
        if not self._shares:
            outputs = dict(zip(values["names"], binding.get_outputs(), strict=True))
            values["logits"] = outputs["logits"]
            for name in self._past:
                self._cache[name] = outputs[_present(name)]
        return self._last(values["logits"])

    def _binding(self, ids: np.ndarray, mask: np.ndarray) -> tuple[Any, dict[str, Any]]:
        """What is bound for so many new tokens; the mask's buffer is anew where it is wider."""
        new = ids.shape[1]
        if new in self._bound and self._shares:
            binding, values = self._bound[new]
            if values["attention_mask"].shape() != list(mask.shape):
                values["attention_mask"] = self._value(mask)
                binding.bind_ortvalue_input("attention_mask", values["attention_mask"])
            return binding, values
        binding, values = self.session.io_binding(), {}
        for name, content in (("input_ids", ids), ("attention_mask", mask)):
            values[name] = self._value(content)
            binding.bind_ortvalue_input(name, values[name])
        for name, cache in self._cache.items():
            binding.bind_ortvalue_input(name, cache)
            if self._shares:
                binding.bind_ortvalue_output(_present(name), cache)
        if self._shares:
            rows = 1 if self._only_last else new
            shape = (ids.shape[0], rows, self.vocabulary)
            values["logits"] = self._value(np.zeros(shape, NUMPY[self.dtype]))
            binding.bind_ortvalue_output("logits", values["logits"])
        else:
            values["names"] = ["logits", *map(_present, self._past)]
            for name in values["names"]:
                binding.bind_output(name, self.provider)
        self._bound[new] = binding, values
        return binding, values

    def _value(self, content: np.ndarray) -> ort.OrtValue:
        if content.dtype.type not in _WITHOUT_NUMPY:
            return ort.OrtValue.ortvalue_from_numpy(content, self.provider, 0)
        kind, bits = _WITHOUT_NUMPY[content.dtype.type]
        shape = list(content.shape)
        value = ort.OrtValue.ortvalue_from_shape_and_type(shape, kind, self.provider, 0)
        value.update_inplace(content.view(bits))
        return value

    def _last(self, logits: ort.OrtValue) -> np.ndarray:
        if self.dtype != "tensor(bfloat16)":
            found: np.ndarray = logits.numpy()[:, -1].astype(np.float32)
            return found
        content = CUDA.read(logits.data_ptr(), logits.tensor_size_in_bytes())
        values = np.frombuffer(content, ml_dtypes.bfloat16).reshape(logits.shape())
        return values[:, -1].astype(np.float32)


def _present(name: str) -> str:
    return name.replace("past_key_values", "present")


def models_of(folder: Path) -> list[Path]:
    """The graphs of a folder: `model.onnx`, or those of its variants."""
    model = folder / "model.onnx"
    return [model] if model.is_file() else sorted(folder.glob("*.onnx")) or [model]


def fill_at_random(folder: Path) -> None:
    """Write the data file of a folder's graphs: values of the right dtypes and sizes, none large.

    Raises:
        SystemExit: There are weights that this function did not write; they are left alone.
    """
    mark = folder / RANDOM
    if not mark.exists() and any(folder.glob("*.data")):
        raise SystemExit(f"{folder} has weights: copy only its graphs for --random")
    mark.touch()
    graphs = [onnx.load(path, load_external_data=False).graph for path in models_of(folder)]
    generator = np.random.default_rng(0)
    small = generator.standard_normal(_BLOCK) * 0.02
    blocks: dict[int, bytes] = {
        onnx.TensorProto.FLOAT: small.astype(np.float32).tobytes(),
        onnx.TensorProto.FLOAT16: small.astype(np.float16).tobytes(),
        onnx.TensorProto.BFLOAT16: small.astype(ml_dtypes.bfloat16).tobytes(),
        onnx.TensorProto.UINT8: generator.integers(0, 256, _BLOCK, np.uint8).tobytes(),
    }
    places: dict[tuple[str, int], tuple[int, int]] = {}
    for tensor in (tensor for graph in graphs for tensor in graph.initializer):
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if entries:
            offset, length = int(entries.get("offset", 0)), int(entries["length"])
            places[entries["location"], offset] = (length, tensor.data_type)
    for name in {location for location, _ in places}:
        if Path(name).name != name:
            raise SystemExit(f"{folder}: data outside the folder: {name}")
        with (folder / name).open("wb") as file:
            for (location, offset), (length, kind) in sorted(places.items()):
                if location != name:
                    continue
                file.seek(offset)
                block = blocks.get(kind, bytes(_BLOCK))
                for start in range(0, length, len(block)):
                    file.write(block[: length - start])
