"""What trainers recognise a PEFT model by, and how they call one.

`transformers.Trainer` and TRL ask `isinstance(model, peft.PeftModel)`: for one, they save adapters
alone, load them again, and take the model without its adapters as the reference of a preference
loss. An adapted module of a transformers model has the verbs that they call then, so it answers yes
where PEFT is installed. No code of PEFT's class is used.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn

from bone_fx.capture.trace.hf_model import is_transformers_model
from bone_fx.errors import UsageError
from bone_fx.operators import forget_masks, head_inputs
from bone_fx.train.adapter_set import AdapterSet


class Recognised(AdapterSet):
    """An adapter set that trainers take for a PEFT model."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """A module whose class is also `peft.PeftModel`, where PEFT is installed."""
        module: Any = super().__new__(cls, *args, **kwargs)
        origin = kwargs.get("origin", args[0] if args else None)
        peft = _peft() if origin is not None and is_transformers_model(origin.model) else None
        if peft is not None:
            kind = type(module)  # fx gives every GraphModule a class of its own
            cover = _cover(kind, peft.PeftModel)
            members = {"__module__": kind.__module__}
            module.__class__ = type(kind.__name__, (kind, cover, peft.PeftModel), members)
        return module  # type: ignore[no-any-return]

    def _call_with_fused_head(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's call with its own head and loss, over the adapted backbone.

        TRL puts it on the model that it takes for the base of a PEFT model.
        """
        forward = vars(self._origin.model).get("forward")
        if forward is None:
            raise UsageError(
                "fused_lm_head is TRL's, and the model has no such head",
                next_step="leave it out, or let TRL's trainer add it",
            )
        return forward.__func__(_HeadlessView(self), *args, **kwargs)

    def _call_backbone(self, *args: Any, **kwargs: Any) -> BackboneOutput:
        """The model's output, with the hidden states that its head reads.

        Raises:
            UsageError: The graph has none.
        """
        forget_masks()
        self._fit_call(*args, **kwargs)
        inputs = self._origin.signature.bind(*args, **kwargs)
        with head_inputs(always=True) as request:
            packed = self._origin.signature.pack(self._run(*inputs))
        if request.inputs is None:
            raise UsageError(
                "the hidden states before the head are no part of this graph: the head has an"
                " adapter, or its result is changed before it is the output",
                next_step="leave the head out of the targets, or train without a fused head",
            )
        return BackboneOutput(request.inputs.x, packed)


@dataclass(frozen=True)
class _HeadlessView:
    """What TRL's forward is given for a model: its backbone, and all else of the adapted module."""

    adapted: Recognised

    def base_model(self, *args: Any, **kwargs: Any) -> BackboneOutput:
        """The backbone's call."""
        return self.adapted._call_backbone(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.adapted, name)


@dataclass(frozen=True)
class BackboneOutput:
    """A model's output without its logits.

    Attributes:
        last_hidden_state: What the head reads, `[B, S, H]`.
        output: The rest of the output, such as `router_logits`.
    """

    last_hidden_state: Tensor
    output: Any

    def __getattr__(self, name: str) -> Any:
        return getattr(self.output, name)


def _peft() -> Any:
    """PEFT's package; None where it is missing or does not fit what is installed."""
    try:
        return importlib.import_module("peft")
    except (ImportError, RuntimeError, AttributeError):  # it was built for other packages
        return None


def _cover(kind: type[nn.Module], peft_model: type[nn.Module]) -> type:
    """A class that stands before PEFT's and has all its members, so that none of them is found.

    An attribute of an instance is found behind a plain member, but not behind a property.
    """
    own = {name for base in kind.__mro__ for name in vars(base).get("__annotations__", ())}
    names = {name for base in peft_model.__mro__ for name in vars(base)} - set(dir(kind))
    members = {
        name: None if name in own else _absent(name) for name in names if not name.startswith("__")
    }

    def start(self: nn.Module) -> None:
        nn.Module.__init__(self)

    return type("Cover", (), {"__init__": start, **members})


def _absent(name: str) -> property:
    def get(self: object) -> Any:
        raise AttributeError(f"{name} of PEFT is not here; docs/peft.md says why")

    return property(get)
