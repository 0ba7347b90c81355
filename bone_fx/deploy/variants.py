"""Several adapters, each folded into a graph of its own, in one folder over one data file.

```
OUT/
    poet.onnx  facts.onnx      a graph a variant
    model.onnx.data            constants of equal bytes stand here once
    genai_config.json          opens the first; onnxruntime-genai opens another by an overlay
    poet.html  facts.html      a report each
```

Every variant is written and verified in a folder of its own first. They lie flat in the end, since
ONNX Runtime reads no data outside a model's folder.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from bone_fx.deploy.earlier_output import files_of
from bone_fx.deploy.genai_config import CONFIG_FILE
from bone_fx.deploy.options import FP8_CACHE
from bone_fx.deploy.report import CARD, PAGE
from bone_fx.errors import LOOK, UsageError, VerificationError
from bone_fx.onnx.data_layout import aligned
from bone_fx.onnx.writer import DATA_FILE, MODEL_FILE

if TYPE_CHECKING:
    import onnx

KIND = "variants"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}", re.ASCII)
_RESERVED = {"model", "report", "README"}
_OF_A_VARIANT = (
    *("kind", "adapters", "change", "rounding", "placement", "quantization", "kv_cache"),
    *("graph", "operators", "verification"),
)
_OF_THE_FOLDER = ("kind", "adapters", "change", "rounding", "verification", "files", "notes")
_MODEL_CONFIG, _TIED = "config.json", "tie_word_embeddings"
_BYTES = 1 << 20
"""Copied at a time."""
_SMALLER_IS_WORSE = "_top1"
_LIKELIHOOD = "nll_"


def check_names(names: Sequence[str]) -> None:
    """Refuse names of variants that are no names of files.

    Raises:
        UsageError: One is not; it is named.
    """
    for name in names:
        if not _NAME.fullmatch(name) or name in _RESERVED:
            raise UsageError(
                f"{name!r} is no name for a variant",
                expected="letters, digits, _ and -, and not " + ", ".join(sorted(_RESERVED)),
                next_step="name it as its file may be named: --variant poet=DIR",
            )
    if len({name.casefold() for name in names}) < len(names):
        raise UsageError(
            "two variants have names that differ in large and small letters only",
            found=", ".join(names),
            next_step="name one of them otherwise: some file systems take the names for one",
        )


class Folder:
    """The folder that variants become, one after another.

    Args:
        path: The folder; variants stand in subfolders first.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifests: dict[str, dict[str, Any]] = {}
        self._beside: set[Path] = set()  # files of the first that are no graph and no page
        self._placed: dict[tuple[bytes, int], int] = {}
        self._end = 0

    def begin(self, name: str) -> Path:
        """A subfolder to write a variant into."""
        folder = self.path / f"{name}.variant"
        folder.mkdir()
        return folder

    def take(self, name: str, manifest: dict[str, Any]) -> None:
        """Move what was written in the subfolder of a variant here.

        Args:
            name: Of the variant.
            manifest: What was written there.

        Raises:
            UsageError: It brings another tokenizer, or other settings, than the first did.
            VerificationError: A constant is not as it was verified.
        """
        folder = self.path / f"{name}.variant"
        self._take_graph(folder, name)
        (folder / PAGE).rename(self.path / f"{name}.html")
        (folder / CARD).unlink()
        beside = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
        if not self.manifests:
            self._beside = beside
        for relative in sorted(beside | self._beside):
            path, there = folder / relative, self.path / relative
            if not self.manifests:
                there.parent.mkdir(parents=True, exist_ok=True)
                path.rename(there)
            elif relative in beside ^ self._beside or not _agree(there, path):
                first = next(iter(self.manifests))
                raise UsageError(
                    f"the variants {first} and {name} differ in {relative}",
                    expected="adapters with the same tokenizer, chat template and settings",
                    next_step=f"export {name} to a folder of its own",
                )
        shutil.rmtree(folder)
        self.manifests[name] = manifest

    def finish(self) -> dict[str, Any]:
        """Let onnxruntime-genai open the first variant; returns the manifest of the folder.

        Raises:
            VerificationError: It does not run one of the variants, or makes other tokens of a text
                than the graph does.
        """
        first = next(iter(self.manifests))
        config = self.path / CONFIG_FILE
        if config.is_file():
            content = json.loads(config.read_text(encoding="utf-8"))
            content["model"]["decoder"]["filename"] = f"{first}.onnx"
            config.write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")
            verification = self.manifests[first]["verification"]
            if verification is not None and verification["provider"] == "cpu":
                run_variants(self.path, self.manifests)
        every = list(self.manifests.values())
        pages = {f"{name}.html" for name in self.manifests}
        files = {name: f for name, f in files_of(self.path).items() if name not in pages}
        differing = [
            key
            for key in dict.fromkeys(key for manifest in every for key in manifest)
            if key not in _OF_THE_FOLDER and any(m.get(key) != every[0].get(key) for m in every)
        ]
        return {
            **{key: value for key, value in every[0].items() if key not in differing},
            "kind": KIND,
            "adapters": [
                {**adapter, "name": name}
                for name, manifest in self.manifests.items()
                for adapter in manifest["adapters"]
            ],
            "change": None,
            "rounding": None,
            "verification": together([manifest["verification"] for manifest in every]),
            "variants": {
                name: {"file": f"{name}.onnx"}
                | {key: manifest[key] for key in (*_OF_A_VARIANT, *differing)}
                for name, manifest in self.manifests.items()
            },
            "files": files,
            "notes": list(dict.fromkeys(n for manifest in every for n in manifest["notes"])),
        }

    def _take_graph(self, folder: Path, name: str) -> None:
        import onnx

        model = onnx.load(folder / MODEL_FILE, load_external_data=False)
        data = folder / DATA_FILE
        written: dict[str, bytes] = {}
        if data.is_file():
            with data.open("rb") as source, (self.path / DATA_FILE).open("ab") as target:
                for (offset, length), tensors in _stored(model.graph).items():
                    place, digest = self._place(source, offset, length, target)
                    for tensor in tensors:
                        _refer(tensor, place, length)
                        written[tensor.name] = digest
            data.unlink()
        content = model.SerializeToString(deterministic=True)
        (self.path / f"{name}.onnx").write_bytes(content)
        (folder / MODEL_FILE).unlink()
        if self._digests(name) != written:
            raise VerificationError(
                f"verification failed: {name}.onnx: constants in the common {DATA_FILE} are others",
                expected="the bytes that were verified",
                next_step=LOOK,
            )

    def _digests(self, name: str) -> dict[str, bytes]:
        """SHA-256 of every stored constant of a variant, read from where its graph says."""
        import onnx

        graph = onnx.load(self.path / f"{name}.onnx", load_external_data=False).graph
        stored = _stored(graph)
        if not stored:
            return {}
        with (self.path / DATA_FILE).open("rb") as data:
            digests = {place: _digest(data, *place) for place in stored}
        return {t.name: digests[place] for place, tensors in stored.items() for t in tensors}

    def _place(
        self, source: BinaryIO, offset: int, length: int, target: BinaryIO
    ) -> tuple[int, bytes]:
        """Where some bytes stand in the common file, and their SHA-256.

        They stand where equal ones are, or at its end.
        """
        key = _digest(source, offset, length), length
        if key not in self._placed:
            self._placed[key] = place = aligned(self._end, length)
            target.write(bytes(place - self._end))
            for chunk in _chunks(source, offset, length):
                target.write(chunk)
            self._end = place + length
        return self._placed[key], key[0]


def _agree(there: Path, path: Path) -> bool:
    """Whether one file does for two variants.

    Heads that only one of them ties differ in the graphs; config.json then says that they are not.
    """
    if there.read_bytes() == path.read_bytes():
        return True
    if path.name != _MODEL_CONFIG:
        return False
    contents = [json.loads(each.read_text(encoding="utf-8")) for each in (there, path)]
    alike = [{**content, _TIED: False} for content in contents]
    if alike[0] != alike[1]:
        return False
    there.write_text(json.dumps(alike[0], indent=2) + "\n", encoding="utf-8")
    return True


def run_variants(folder: Path, variants: Mapping[str, Mapping[str, Any]]) -> None:
    """Let onnxruntime-genai generate on the CPU with every variant that has kernels there.

    Args:
        folder: Where they are.
        variants: What a manifest says of each, by name.

    Raises:
        VerificationError: It does not run one, or makes other tokens than the graph itself.
    """
    from bone_fx.verify.decoder.genai_folder import verify_generation
    from bone_fx.verify.graph import WrittenGraph
    from bone_fx.verify.parity import TOLERANCE, Parity

    for name, said in variants.items():
        if has_cpu_kernels(said):
            graph = WrittenGraph(folder / f"{name}.onnx", "cpu")
            verify_generation(Parity(TOLERANCE["fp32"]), graph)


def has_cpu_kernels(manifest: Mapping[str, Any]) -> bool:
    """Whether the CPU provider runs a graph: not one in bf16, nor one with a cache in fp8."""
    cache = manifest["kv_cache"] or {}
    logits = manifest["graph"]["outputs"].get("logits", "")
    return not logits.startswith("bfloat16") and cache.get("dtype") != FP8_CACHE


def _digest(source: BinaryIO, offset: int, length: int) -> bytes:
    digest = hashlib.sha256()
    for chunk in _chunks(source, offset, length):
        digest.update(chunk)
    return digest.digest()


def _stored(graph: onnx.GraphProto) -> dict[tuple[int, int], list[onnx.TensorProto]]:
    """Offset and length -> the constants that stand there, in the order of the file."""
    places: dict[tuple[int, int], list[onnx.TensorProto]] = {}
    for tensor in graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if entries:
            place = int(entries.get("offset", 0)), int(entries["length"])
            places.setdefault(place, []).append(tensor)
    return dict(sorted(places.items()))


def _refer(tensor: onnx.TensorProto, offset: int, length: int) -> None:
    values = {"location": DATA_FILE, "offset": str(offset), "length": str(length)}
    for entry in tensor.external_data:
        entry.value = values.get(entry.key, entry.value)


def _chunks(source: BinaryIO, offset: int, length: int) -> Iterator[bytes]:
    source.seek(offset)
    while length:
        chunk = source.read(min(length, _BYTES))
        if not chunk:
            return
        length -= len(chunk)
        yield chunk


def together(entries: Sequence[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """What was verified of all: of each figure the worst, likelihoods apart."""
    known = [entry for entry in entries if entry is not None]
    if len(known) < len(entries):
        return None
    names = dict.fromkeys(name for entry in known for name in entry["figures"])
    figures = {}
    for name in names:
        if name.startswith(_LIKELIHOOD):
            continue
        values = [entry["figures"][name] for entry in known if name in entry["figures"]]
        figures[name] = min(values) if name.endswith(_SMALLER_IS_WORSE) else max(values)
    return {
        **known[0],
        "figures": figures,
        "cases": sum(entry["cases"] for entry in known),
        "ran": list(dict.fromkeys(case for entry in known for case in entry["ran"])),
        "skipped": {case: why for entry in known for case, why in entry["skipped"].items()},
        "warnings": list(dict.fromkeys(w for entry in known for w in entry["warnings"])),
    }
