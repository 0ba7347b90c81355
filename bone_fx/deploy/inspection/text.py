"""An adapter's view as lines of a terminal: layers of one site share a line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bone_fx.errors import some

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")
_SHOWN = 12
"""Most names of a list that is shown on a line."""


def as_lines(view: Mapping[str, Any]) -> list[str]:
    """The lines.

    Args:
        view: What `inspect_adapter` found.
    """
    config, origin, base = view["config"], view["origin"], view.get("base")
    kind = [config.get("peft_type"), view["method"]]
    named = {
        "type": ", ".join(str(each) for each in kind if each is not None) or "?",
        **{label: config.get(field) for field, label in _LABELS.items()},
        "licence": origin.get("license"),
        "of base": origin.get("base_model"),
    }
    lines = [f"adapter  {view['adapter']}", *_named(named), "", *_blocks(view["blocks"])]
    if view["saved"]:
        rows = [[r["name"], str(r["shape"]), r["dtype"], _norm(r)] for r in view["saved"]]
        lines += ["", "other tensors", *_table(rows)]
    lines += _named({"unused": view["unused"]})
    files = [[f["name"], _size(f["bytes"]), f["use"]] for f in view["files"]]
    lines += ["", "files", *_table(files), ""]
    if base is not None:
        fits = f"{base['adapted']} of {base['layers']} linear layers are adapted"
        lines.append(f"base     {base['name']}: {base['architecture']}")
        lines += _named(
            {"fits": fits, "brings": base["from_the_adapter"], "unties": base["untied"]}
        )
    for refusal in view["refused"]:
        message = f"refused  (exit {refusal['exit_code']}) {refusal['message']}"
        lines += message.split("\n")  # indented by the error: a name cannot pass for a line of ours
    if not view["refused"]:
        more = "" if base is not None else "; pass --base to see how it fits a model"
        lines.append(f"nothing would be refused{more}")
    return lines


def _named(values: Mapping[str, object]) -> list[str]:
    """A line for every value that is there."""
    return [
        f"{label:8} {_short(value)}"
        for label, value in values.items()
        if value not in (None, [], "")
    ]


_LABELS = {
    "r": "r",
    "mini_r": "mini_r",
    "lora_alpha": "alpha",
    "target_parameters": "params",
    "target_modules": "targets",
    "exclude_modules": "but not",
    "layers_to_transform": "layers",
    "modules_to_save": "saves",
    "task_type": "task",
    "base_model_name_or_path": "base",
}


def _blocks(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for the blocks of one site in all layers."""
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        name = f"{row['name']} {row.get('part', '')}".rstrip()
        key = _NUMBER.sub("*", name), str(row["shape"]), row["dtype"]
        groups.setdefault(key, []).append(row)
    table = [["site", "layers", "block", "dtype", "norm"]]
    has_change = any("change" in row for row in rows)
    if has_change:
        table[0] += ["in, out", "‖ΔW‖/‖W‖"]
    for (name, shape, dtype), group in groups.items():
        line = [name, str(len(group)), shape, dtype, _range(r["norm"] for r in group)]
        if has_change:
            first = group[0]
            fits = "in_features" in first
            line += [f"{first['in_features']}, {first['out_features']}" if fits else "none"]
            line += [_range(r.get("change") for r in group)]
        table.append(line)
    if not rows:
        return ["no blocks"]
    kind = "tensors of blocks" if any("part" in row for row in rows) else "blocks"
    return [f"{len(rows)} {kind}", *_table(table)]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    padded = [[f"{cell:{w}}" for cell, w in zip(row, widths, strict=True)] for row in rows]
    return [f"  {'  '.join(row)}".rstrip() for row in padded]


def _range(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "?"
    low, high = min(known), max(known)
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"


def _norm(row: Mapping[str, Any]) -> str:
    return "" if row["norm"] is None else f"norm {row['norm']:.3g}"


def _size(count: int | None) -> str:
    return "" if count is None else f"{count:,} bytes"


def _short(value: object) -> str:
    if isinstance(value, list):
        return some([str(each) for each in value], _SHOWN) if value else ""
    return str(value)[:400]
