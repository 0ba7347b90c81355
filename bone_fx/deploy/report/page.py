"""`report.html`: all of a manifest on one page, and how long the stages took.

The page holds no script and loads nothing: it opens from disk.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from bone_fx.deploy.report.heat_map import heat_map
from bone_fx.deploy.report.templating import html_templates

_MEANING = {
    "onnx_vs_unmerged": "the graph against torch with the adapters beside the weights",
    "onnx_vs_folded": "the graph against torch with the adapters folded in",
    "onnx_vs_written": "the graph against torch with the weights as they were written",
    "onnx_vs_torch": "the graph against the module",
    "unmerged_vs_folded": "torch beside the weights against torch folded",
    "int8_cache": "what keeping keys and values in int8 changes",
    "fp8_cache": "what keeping keys and values in fp8 changes",
    "rounded_activations": "what rounding activations alone changes",
    "long_texts": "the graph against torch on texts beyond windows and tables of positions",
    "greedy_tokens": "tokens chosen greedily: how far torch's choices lie below its best",
    "nll_base": "negative log-likelihood a token of the samples: the base",
    "nll_adapter": "the same: torch with the adapters",
    "nll_export": "the same: the graph",
    "adapter_effect": "how far the adapters move the outputs of the base",
}
"""What the figures of a verification compare."""
_ENDINGS = {
    "_top1": "share of tokens that both choose alike",
    "_kl": "largest divergence of the two distributions of a token, in nats",
}
_SHOWN = {"mode", "provider", "tolerance", "figures", "cases", "ran", "skipped", "warnings"}
"""Fields of a verification that have a place of their own on the page."""
_ROW = re.compile(r", row \d+$")
_MOST_ROWS = 2000


def page(
    manifest: Mapping[str, Any], stages: Sequence[tuple[str, float]], error: str | None = None
) -> str:
    """The page.

    Args:
        manifest: The content of `bone_export.json`.
        stages: Name and seconds of every stage.
        error: What failed, for a build that is kept though it failed verification.
    """
    verification = manifest.get("verification") or {}
    rounding = manifest.get("rounding") or {}
    change = manifest.get("change") or {}
    lost = {site: round(1 - kept, 3) for site, kept in rounding.get("effect_kept", {}).items()}
    warnings = [*verification.get("warnings", ()), *manifest["notes"]]
    return (
        html_templates()
        .get_template("page.j2")
        .render(
            manifest=manifest,
            title=_title(manifest),
            error=error,
            warnings=list(dict.fromkeys(warnings)),
            verification=verification,
            figures=[(k, v, meaning(k)) for k, v in verification.get("figures", {}).items()],
            cases=cases(verification),
            others={k: v for k, v in verification.items() if k not in _SHOWN},
            change=_figures(change),
            change_map=heat_map(change),
            rounding=rounding,
            lost=_figures(lost),
            lost_map=heat_map(lost),
            stages=[s for s in stages if s[1] >= 0.0005],
            total=sum(seconds for _, seconds in stages),
            longest=max((seconds for _, seconds in stages), default=0.0) or 1.0,
            nbytes=sum(entry["bytes"] for entry in manifest["files"].values()),
            written=datetime.now().astimezone().isoformat(timespec="seconds"),
        )
    )


def _title(manifest: Mapping[str, Any]) -> str:
    adapters = [_name(adapter) for adapter in manifest["adapters"]]
    return " + ".join([manifest["base"]["name"], *adapters])


def _name(adapter: Mapping[str, Any]) -> str:
    return str(adapter["folder"] if adapter["name"] == "default" else adapter["name"])


def meaning(figure: str) -> str:
    """What a figure of a verification compares; empty for one that says so itself."""
    for ending, what in _ENDINGS.items():
        if figure.endswith(ending):
            pair = _MEANING.get(figure.removesuffix(ending))
            return f"{pair}: {what}" if pair else what
    return _MEANING.get(figure, "")


def cases(verification: Mapping[str, Any]) -> list[str]:
    """The cases that ran, the rows of a batch as one."""
    return list(dict.fromkeys(_ROW.sub("", case) for case in verification.get("ran", ())))


def _figures(values: Mapping[str, float | None]) -> dict[str, Any]:
    """Figures by layer, as many as a page takes, and how many more there are."""
    rows = list(values.items())
    return {"rows": rows[:_MOST_ROWS], "more": max(0, len(rows) - _MOST_ROWS)}
