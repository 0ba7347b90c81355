"""What an adapted module looks like: a few lines in a terminal, a table in a notebook."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterator

from bone_fx.train.adapter_set import AdapterSet

_MOST = 24
"""Rows of layers that are shown; a model has about ten kinds."""


class Shown(AdapterSet):
    """An adapter set that says in at most 40 lines what it is."""

    def __repr__(self) -> str:
        """The adapters, their layers by kind with shapes, and the share that trains."""
        header, *rows = self._rows()
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in (header, *rows)]
        return "\n".join([self._title(), *(f"  {line}" for line in lines)])

    def _repr_html_(self) -> str:
        """The same as a table."""
        header, *rows = ([html.escape(cell) for cell in row] for row in self._rows())
        head = "".join(f"<th>{cell}</th>" for cell in header)
        body = "".join(f"<tr>{''.join(f'<td>{c}</td>' for c in row)}</tr>" for row in rows)
        title = html.escape(self._title())
        return f"<table><caption>{title}</caption><tr>{head}</tr>{body}</table>"

    def _title(self) -> str:
        trained, total = self.get_nb_trainable_parameters()
        model = type(self._origin.model or self._base).__name__
        state = ", adapters off" if self._disabled else ""
        share = f"{100 * trained / max(total, 1):.2f} %"
        return (
            f"AdaptedModule of {model}: {trained:,} of {total:,} parameters train ({share}){state}"
        )

    def _rows(self) -> list[list[str]]:
        rows = [row for name in self._adapters for row in self._rows_of(name)]
        if len(rows) > _MOST:
            rows = [*rows[:_MOST], [f"and {len(rows) - _MOST} more", "", "", "", ""]]
        return [["adapter", "", "layers", "weight", "block"], *rows]

    def _rows_of(self, name: str) -> Iterator[list[str]]:
        adapter = self._adapters[name]
        weights = {
            site.name: (site.out_features, site.in_features) for site in self._touched([name])
        }
        kinds = Counter(
            (site.rpartition(".")[2], weights[site], tuple(block.shape))
            for site, block in adapter.blocks.items()
        )
        on = (
            "merged"
            if name in self._merged
            else "active"
            if name in self.active_adapters
            else "off"
        )
        trains = any(parameter.requires_grad for parameter in adapter.parameters())
        first = [name, f"{adapter.config.method}, {on}, {'trains' if trains else 'frozen'}"]
        for (kind, weight, block), count in kinds.items():
            yield [*first, f"{count} x {kind}", _shape(weight), _shape(block)]
            first = ["", ""]
        for whole, parameter in adapter.saved.items():
            yield [*first, whole, _shape(tuple(parameter.shape)), "whole"]
            first = ["", ""]


def _shape(sizes: tuple[int, ...]) -> str:
    return " x ".join(map(str, sizes))
