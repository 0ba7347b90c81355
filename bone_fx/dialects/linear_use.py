"""What every dialect answers about a node: one use of a linear layer's weight."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from bone_fx.sites import LinearSite


@dataclass(frozen=True)
class LinearUse:
    """One node that multiplies by a site's weight.

    Attributes:
        node: The node whose value is the layer's output.
        site: The site; a module that is called twice has two uses of one site.
        x: The input `[..., I]`.
        bias: The bias: a node, the dotted name of a parameter (for `call_module`), or None.
        family: `"aten"` for exported graphs, `"functional"` for graphs that call torch's Python
            functions.
    """

    node: fx.Node
    site: LinearSite
    x: fx.Node
    bias: fx.Node | str | None
    family: str


def owner_of(weight_name: str) -> str:
    """The site's name: the module that owns `<name>.weight`, or the parameter's own name."""
    return weight_name.removesuffix(".weight")


def module_type(node: fx.Node, site_name: str) -> str | None:
    """Class name of the module at `site_name` if the trace recorded it around this node."""
    stack = node.meta.get("nn_module_stack") or {}
    for path, kind in stack.values():
        if path.removeprefix("L['self'].") == site_name:
            return str(kind if isinstance(kind, str) else kind.__name__).rpartition(".")[2]
    return _innermost_other(stack)


def _innermost_other(stack: dict[str, tuple[str, object]]) -> str | None:
    """A weight that is read outside the module that owns it belongs to no layer call.

    Name the reader's class.
    """
    if not stack:
        return None
    _, kind = list(stack.values())[-1]
    return str(kind if isinstance(kind, str) else getattr(kind, "__name__", kind)).rpartition(".")[
        2
    ]
