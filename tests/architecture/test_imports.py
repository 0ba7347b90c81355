"""Who may know whom. A room that needs another one is a row here, changed with a reason."""

from __future__ import annotations

import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from tests.architecture.sources import PACKAGE, ROOT, imports_of, python_files, room_of

# From the leaves to the command line. A row names only rooms above it, so there are no circles and
# no import upwards. *train* and *deploy* are the two flows; deploy knows train only to take an
# adapted module, inside a function.
MAY_KNOW: dict[str, set[str]] = {
    "errors": set(),
    "files": {"errors"},
    "progress": set(),
    "collector": set(),
    "graphs": {"errors"},
    "adapters": {"errors"},
    "operators": {"adapters", "errors"},
    "config": {"errors", "files"},
    "runtime": {"errors", "files"},
    "default_targets": set(),
    "sites": {"adapters", "config", "errors"},
    "adapter_folder": {"adapters", "config", "errors", "files", "sites"},
    "dialects": {"errors", "graphs", "operators", "sites"},
    "weights": {"adapters", "config", "errors", "sites"},
    "base": {"errors", "files", "weights"},
    "passes": {"adapters", "config", "dialects", "errors", "graphs", "operators", "sites"},
    "lean": {"dialects", "graphs", "operators", "passes"},
    "lower": {"errors", "passes"},
    "onnx": {"collector", "errors", "graphs", "weights"},
    # The format of quantized weights stands in weights.
    "verify": {
        *("adapter_folder", "errors", "onnx", "operators", "passes", "runtime", "sites", "weights"),
    },
    "capture": {"collector", "errors", "graphs", "lower", "operators", "passes", "progress"},
    # Of base it is the hub: adapters are fetched and uploaded.
    "train": {
        *("adapter_folder", "adapters", "base", "capture", "config", "default_targets", "dialects"),
        *("errors", "lean", "graphs", "operators", "passes", "progress", "sites"),
    },
    "deploy": {
        *("adapter_folder", "base", "capture", "config", "dialects", "errors", "files", "onnx"),
        *("passes", "progress", "runtime", "sites", "train", "verify", "weights"),
    },
    # Of runtime the command line takes the generation, which reads a published folder alone.
    "cli": {"deploy", "errors", "progress", "runtime"},
    "__main__": {"cli"},
    "__init__": {"config", "deploy", "errors", "passes", "train"},
}

# Third-party packages and the only rooms that may import them; what is free stands below.
HOMES: dict[str, set[str]] = {
    "transformers": {"base", "capture", "train", "verify"},
    "huggingface_hub": {"base", "train"},  # train: the format of model cards
    "jinja2": {"deploy"},
    "markupsafe": {"deploy"},
    "packaging": {"deploy"},
    "yaml": {"deploy"},
    "gguf": {"base"},
    "onnx": {"onnx", "deploy", "runtime", "verify"},
    "onnx_ir": {"onnx", "deploy", "verify"},
    "onnxscript": {"onnx"},
    "onnxruntime": {"runtime", "verify"},
    "onnxruntime_genai": {"runtime", "verify"},
    "regex": {"sites"},
    "rich": {"progress"},
    "sympy": {"capture"},
    "typer": {"cli"},
}
FREE = {"torch", "numpy", "safetensors"}


def _imports_by_room(*, for_types: bool) -> dict[str, dict[str, set[str]]]:
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for path in python_files("bone_fx"):
        for module in imports_of(path, for_types=for_types):
            found[room_of(path)][module].add(str(path.relative_to(PACKAGE)))
    return found


def _room_named(module: str) -> str | None:
    """The room that a dotted module name belongs to; None outside the package."""
    package, _, rest = module.partition(".")
    room = rest.partition(".")[0]
    return room if package == "bone_fx" and room in MAY_KNOW else None


def _file_of(module: str) -> Path | None:
    """The file of a module of the package; None for a module elsewhere."""
    path = ROOT.joinpath(*module.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if module.partition(".")[0] == "bone_fx" and candidate.is_file():
            return candidate
    return None


def _entry(path: Path | None, folder: Path) -> str:
    """The file or folder, standing in a folder, that a file is or is part of; empty for none."""
    if path is None or not path.is_relative_to(folder):
        return ""
    return path.relative_to(folder).parts[0].removesuffix(".py")


FOLDERS = sorted(
    {str(path.parent.relative_to(PACKAGE)) for path in python_files("bone_fx")} - {"."}
)
IMPORTS = _imports_by_room(for_types=True)
EXECUTED = _imports_by_room(for_types=False)


def test_every_room_has_its_row() -> None:
    assert set(IMPORTS) | {room_of(path) for path in python_files("bone_fx")} == set(MAY_KNOW)


def test_rows_name_only_rooms_above_them() -> None:
    above: set[str] = set()
    for room, known in MAY_KNOW.items():
        assert known <= above, f"{room} names {sorted(known - above)}, which stands at or below it"
        above.add(room)


@pytest.mark.parametrize("room", MAY_KNOW)
def test_room_knows_only_what_it_may(room: str) -> None:
    wrong = {
        module: sorted(files)
        for module, files in IMPORTS[room].items()
        if (other := _room_named(module)) and other not in MAY_KNOW[room] | {room}
    }
    assert not wrong, f"{room} may know {sorted(MAY_KNOW[room])}"


@pytest.mark.parametrize("room", MAY_KNOW)
def test_third_party_packages_stay_in_their_rooms(room: str) -> None:
    outside = {
        package: sorted(files)
        for module, files in EXECUTED[room].items()
        if (package := module.split(".")[0]) not in sys.stdlib_module_names | FREE | {"bone_fx"}
        and room not in HOMES.get(package, set())
    }
    assert not outside


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_circle_on_any_floor(folder: str) -> None:
    """Between the files and folders that stand in one folder imports go one way."""
    knows: dict[str, set[str]] = defaultdict(set)
    for path in python_files(f"bone_fx/{folder}"):
        entry = _entry(path, PACKAGE / folder)
        knows[entry] |= {
            other
            for module in imports_of(path)
            if (other := _entry(_file_of(module), PACKAGE / folder)) and other != entry
        }
    while free := [entry for entry, known in knows.items() if not known & set(knows)]:
        for entry in free:
            del knows[entry]
    assert not knows


def test_exporting_a_checkpoint_imports_nothing_of_training() -> None:
    """The stages import each other where they are used; this is what they reach at import."""
    program = (
        "import sys, bone_fx.deploy.export, bone_fx.deploy.fold_checkpoint, "
        "bone_fx.deploy.builds.checkpoint, bone_fx.capture.decoder.capture_decoder; "
        "sys.exit(','.join(m for m in sys.modules if m.startswith(('bone_fx.train', "
        "'bone_fx.lean', 'bone_fx.capture.training'))) or None)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_adapters_and_dialects_do_not_know_each_other() -> None:
    """N methods and M graph forms cost N + M files; through a third room they would not."""

    def reach(room: str) -> set[str]:
        return MAY_KNOW[room].union(*(reach(known) for known in MAY_KNOW[room]))

    assert "dialects" not in reach("adapters")
    assert not {module for module in IMPORTS["dialects"] if module.startswith("bone_fx.adapters")}


def test_peft_is_imported_by_nobody() -> None:
    wrong = [
        room for room, modules in IMPORTS.items() if any(m.split(".")[0] == "peft" for m in modules)
    ]
    assert not wrong
