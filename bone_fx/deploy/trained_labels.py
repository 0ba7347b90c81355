"""Names of the classes that an adapter's head was trained for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bone_fx.deploy.companions.reading import read_object

if TYPE_CHECKING:
    from bone_fx.adapter_folder import Adapters

CONFIG = "config.json"
_PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")


def trained_labels(adapters: Adapters, labels: int) -> dict[str, Any]:
    """Labels and kind of problem of the last adapter that brings a `config.json` with them.

    PEFT does not write that file; a training script that knows its labels does
    (`model.config.save_pretrained(folder)`).

    Args:
        adapters: The adapters by name, in the order in which they apply.
        labels: Classes of the head.

    Returns:
        `id2label`, `label2id` and `problem_type`, as far as there is a label to each class.

    Raises:
        InputRefusedError: A file cannot be read.
    """
    for _, adapter in reversed(list(adapters)):
        content = read_object(adapter.path / CONFIG)
        names = content.get("id2label")
        if not isinstance(names, dict) or set(names) != {str(n) for n in range(labels)}:
            continue
        if not all(isinstance(name, str) for name in names.values()):
            continue
        problem = content.get("problem_type")
        return {
            "id2label": {n: names[str(n)] for n in range(labels)},
            "label2id": {names[str(n)]: n for n in range(labels)},
            **({"problem_type": problem} if problem in _PROBLEMS else {}),
        }
    return {}
