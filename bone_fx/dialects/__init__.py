"""What a linear layer looks like in a graph. `FORMS` is the literal table.

Adding a form is one file and one row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from bone_fx.dialects import adapted_calls, aten, functional, module_calls
from bone_fx.dialects.linear_use import LinearUse
from bone_fx.graphs import attribute_at
from bone_fx.sites import LinearSite, Refusal

FORMS: tuple[Callable[[fx.GraphModule, fx.Node], LinearUse | None], ...] = (
    module_calls.read,
    functional.read,
    aten.read,
    adapted_calls.read,
)


@dataclass(frozen=True)
class SiteSearch:
    """Every linear use of a graph, and the parameters that are none.

    Attributes:
        uses: The uses, in graph order.
        others: Parameters of two or more dimensions that are read by something else, with the
            reason.
    """

    uses: tuple[LinearUse, ...]
    others: tuple[Refusal, ...]

    @property
    def sites(self) -> list[LinearSite]:
        """The distinct sites, in graph order."""
        return list({use.site.name: use.site for use in self.uses}.values())


def find_sites(gm: fx.GraphModule) -> SiteSearch:
    """Find the linear layers of a graph by their original names."""
    uses = [use for node in gm.graph.nodes if (use := read_use(gm, node)) is not None]
    known = {use.site.weight_name for use in uses} | {
        u.bias for u in uses if isinstance(u.bias, str)
    }
    others = {
        str(node.target): Refusal(str(node.target), _reason(gm, node))
        for node in gm.graph.nodes
        if node.op == "get_attr"
        and str(node.target) not in known
        and _is_matrix(gm, str(node.target))
    }
    for node in gm.graph.nodes:
        if node.op == "call_module" and str(node.target) not in {use.site.name for use in uses}:
            module = gm.get_submodule(str(node.target))
            if module_calls.site_of(str(node.target), module) is not None:
                name, kind = str(node.target), type(module).__name__
                others[name] = Refusal(name, f"a {kind} with hooks or a forward of its own")
    return SiteSearch(tuple(uses), tuple(others.values()))


def read_use(gm: fx.GraphModule, node: fx.Node) -> LinearUse | None:
    """The linear use at a node, read by the first form that knows it; None if none does."""
    return next((use for form in FORMS if (use := form(gm, node)) is not None), None)


def find_module_sites(model: torch.nn.Module) -> tuple[list[LinearSite], list[Refusal]]:
    """The linear layers of a model that was not traced, and its other matrices."""
    sites = [
        s
        for name, module in model.named_modules()
        if (s := module_calls.site_of(name, module)) is not None
    ]
    weights = {site.weight_name for site in sites}
    others = [
        Refusal(name, f"a parameter of shape {list(parameter.shape)}, not a linear layer's weight")
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name not in weights and parameter.dim() >= 2
    ]
    return sites, others


def _is_matrix(gm: fx.GraphModule, name: str) -> bool:
    tensor = attribute_at(gm, name)
    return isinstance(tensor, torch.nn.Parameter) and tensor.dim() >= 2


def _reason(gm: fx.GraphModule, node: fx.Node) -> str:
    tensor = attribute_at(gm, str(node.target))
    shape = list(tensor.shape) if isinstance(tensor, torch.Tensor) else []
    readers = sorted({str(user.target) for user in node.users})
    kind = "a stack of expert weights" if len(shape) == 3 else "a parameter"
    return f"{kind} of shape {shape} read by {', '.join(readers) or 'nothing'}, not a linear layer"


__all__ = ["FORMS", "LinearUse", "SiteSearch", "find_module_sites", "find_sites", "read_use"]
