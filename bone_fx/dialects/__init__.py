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
    matrices = {
        str(node.target): node
        for node in gm.graph.find_nodes(op="get_attr")
        if str(node.target) not in known and _is_matrix(gm, str(node.target))
    }
    refusals = [_refusal(gm, node) for node in matrices.values()]
    others = {refusal.name: refusal for refusal in refusals}
    for node in gm.graph.nodes:
        if node.op == "call_module" and str(node.target) not in {use.site.name for use in uses}:
            module = gm.get_submodule(str(node.target))
            reason = module_calls.reason_against(module)
            if module_calls.site_of(str(node.target), module) is not None and reason:
                others[str(node.target)] = Refusal(str(node.target), reason)
    return SiteSearch(tuple(uses), tuple(others.values()))


def read_use(gm: fx.GraphModule, node: fx.Node) -> LinearUse | None:
    """The linear use at a node, read by the first form that knows it; None if none does."""
    return next((use for form in FORMS if (use := form(gm, node)) is not None), None)


def find_module_sites(model: torch.nn.Module) -> tuple[list[LinearSite], list[Refusal]]:
    """The linear layers of a model that was not traced, and its other matrices."""
    linears = {
        site: module
        for name, module in model.named_modules()
        if (site := module_calls.site_of(name, module)) is not None
    }
    sites = [s for s, module in linears.items() if module_calls.has_parameter(module, "weight")]
    weights = {site.weight_name for site in sites}
    reason = f"its weight {module_calls.NO_PARAMETER}"
    others = [Refusal(site.name, reason) for site in linears if site.weight_name not in weights]
    others += [
        Refusal(name, f"a parameter of shape {list(parameter.shape)}, not a linear layer's weight")
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name not in weights and parameter.dim() >= 2
    ]
    return sites, others


def _is_matrix(gm: fx.GraphModule, name: str) -> bool:
    tensor = attribute_at(gm, name)
    return isinstance(tensor, torch.nn.Parameter) and tensor.dim() >= 2


def _refusal(gm: fx.GraphModule, node: fx.Node) -> Refusal:
    """Why a matrix that a node reads is no linear layer's weight."""
    name = str(node.target)
    layer, parametrized, _ = name.partition(".parametrizations.weight.")
    if parametrized:
        return Refusal(layer, "its weight is computed by a parametrization")
    tensor = attribute_at(gm, name)
    shape = list(tensor.shape) if isinstance(tensor, torch.Tensor) else []
    readers = ", ".join(sorted({str(user.target) for user in node.users})) or "nothing"
    kind = "a stack of expert weights" if len(shape) == 3 else "a parameter"
    return Refusal(name, f"{kind} of shape {shape} read by {readers}, not a linear layer")


__all__ = ["FORMS", "LinearUse", "SiteSearch", "find_module_sites", "find_sites", "read_use"]
