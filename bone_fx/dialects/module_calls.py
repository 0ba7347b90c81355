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
    if site is None or not isinstance(x, fx.Node) or reason_against(module):
        return None
    bias = f"{name}.bias" if getattr(module, "bias", None) is not None else None
    return LinearUse(node, site, x, bias, "functional")


def reason_against(module: nn.Module) -> str | None:
    """Why calling a linear module is more than the product with a parameter; None if it is not."""
    kind = type(module).__name__
    linear = kind == "Conv1D" or type(module).forward is nn.Linear.forward
    if not linear or module._forward_hooks or module._forward_pre_hooks:
        return f"a {kind} with hooks or a forward of its own"
    parts = ["weight", *(["bias"] if getattr(module, "bias", None) is not None else [])]
    computed = next((part for part in parts if not has_parameter(module, part)), None)
    return None if computed is None else f"its {computed} {NO_PARAMETER}"


def has_parameter(module: nn.Module, part: str) -> bool:
    """Whether the weight or bias of a linear module is a parameter, not computed and no buffer."""
    return module._parameters.get(part) is not None


NO_PARAMETER = "is no parameter but computed (weight norm, a parametrization, pruning), or a buffer"


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
