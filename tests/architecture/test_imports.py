"""Who may know whom. A room that needs another one is a row here, changed with a reason."""

from __future__ import annotations

import sys
from collections import defaultdict

import pytest

from tests.architecture.sources import PACKAGE, imports_of, python_files, room_of

# From the leaves to the command line. A row names only rooms above it, so there are no cycles.
MAY_KNOW: dict[str, set[str]] = {
    "errors": set(),
    "progress": set(),
    "staging": {"errors"},
    "adapters": {"errors"},
    "operators": {"adapters", "errors"},
    "config": {"errors"},
    "sites": {"adapters", "config", "errors"},
    "checkpoint": {"adapters", "config", "errors", "sites"},
    "dialects": {"errors", "operators", "sites"},
    "passes": {"adapters", "config", "dialects", "errors", "operators", "sites"},
    "weights": {"adapters", "config", "errors", "sites"},
    "capture": {"errors", "operators", "passes", "weights"},
    "onnx": {"capture", "errors", "weights"},
    "runtime": {"errors"},
    # The format of quantized weights stands in weights.
    "verify": {
        "checkpoint",
        "errors",
        "onnx",
        "operators",
        "passes",
        "runtime",
        "sites",
        "weights",
    },
    "mounting": {
        "adapters",
        "capture",
        "checkpoint",
        "config",
        "dialects",
        "errors",
        "passes",
        "sites",
    },
    "model_graph": {"passes"},
    "folded": {"capture", "model_graph", "passes"},
    "training_graph": {"errors", "model_graph", "mounting", "operators", "passes"},
    "adapted": {
        "checkpoint",
        "config",
        "dialects",
        "errors",
        "folded",
        "mounting",
        "passes",
        "sites",
        "training_graph",
    },
    "adapting": {"adapted", "capture", "checkpoint", "config", "mounting"},
    "trainer": {"adapted", "errors"},
    "build": {
        "adapted",
        "adapting",
        "capture",
        "checkpoint",
        "dialects",
        "errors",
        "onnx",
        "passes",
        "progress",
        "runtime",
        "sites",
        "verify",
        "weights",
    },
    "manifest": {"build", "checkpoint", "config", "errors", "verify"},
    "exporting": {
        "build",
        "checkpoint",
        "errors",
        "manifest",
        "progress",
        "runtime",
        "staging",
        "verify",
    },
    "folding": {
        "build",
        "capture",
        "checkpoint",
        "errors",
        "manifest",
        "passes",
        "progress",
        "staging",
        "weights",
    },
    "cli": {"errors", "exporting", "folding", "progress"},
    "__main__": {"cli"},
    "__init__": {
        "adapted",
        "adapting",
        "config",
        "errors",
        "exporting",
        "folding",
        "passes",
        "trainer",
    },
}

# Third-party packages and the only rooms that may import them; what is free stands below.
HOMES: dict[str, set[str]] = {
    "transformers": {"capture", "trainer"},
    "huggingface_hub": {"capture"},
    "gguf": {"capture"},
    "onnx": {"onnx", "manifest", "runtime", "verify"},
    "onnx_ir": {"onnx", "build", "verify"},
    "onnxscript": {"onnx"},
    "onnxruntime": {"runtime", "verify"},
    "onnxruntime_genai": {"runtime", "verify"},
    "rich": {"progress", "cli"},
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
