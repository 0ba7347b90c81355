"""`call_module` of `nn.Linear` and of Hugging Face's `Conv1D`, from `torch.fx.symbolic_trace`.

`Conv1D` is recognised by the name of its class and its parts (a 2-D weight `[I, O]`, `nf == O`), so
that transformers stays optional.
"""

from __future__ import annotations

import torch
from torch import fx, nn

from bone_fx.dialects.linear_use import LinearUse
from bone_fx.sites import LinearSite


def read(gm: fx.GraphModule, node: fx.Node) -> LinearUse | None:
    """The linear use at a `call_module` node, or None."""
    if node.op != "call_module":
        return None
    x = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("x"))
    name = str(node.target)
    module = gm.get_submodule(name)
    site = site_of(name, module)
    if site is None or not isinstance(x, fx.Node) or not is_plain(module):
        return None
    bias = f"{name}.bias" if getattr(module, "bias", None) is not None else None
    return LinearUse(node, site, x, bias, "functional")


def is_plain(module: nn.Module) -> bool:
    """Whether calling the module is the product alone: no hooks, no forward of a subclass."""
    linear = type(module).__name__ == "Conv1D" or type(module).forward is nn.Linear.forward
    return linear and not module._forward_hooks and not module._forward_pre_hooks


def site_of(name: str, module: nn.Module) -> LinearSite | None:
    """The site that a module is, or None."""
    transposed = _is_conv1d(module)
    weight = getattr(module, "weight", None)
    if (
        not (transposed or isinstance(module, nn.Linear))
        or not isinstance(weight, torch.Tensor)
        or weight.dim() != 2
    ):
        return None
    out_features, in_features = weight.shape[::-1] if transposed else weight.shape
    return LinearSite(
        name,
        f"{name}.weight",
        in_features,
        out_features,
        transposed,
        "Conv1D" if transposed else "Linear",
    )


def _is_conv1d(module: nn.Module) -> bool:
    weight, width = getattr(module, "weight", None), getattr(module, "nf", None)
    return (
        type(module).__name__ == "Conv1D"
        and isinstance(weight, torch.Tensor)
        and weight.dim() == 2
        and width == weight.shape[1]
    )
