"""A traced graph that is called like the model it came from, and switched like it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from torch import fx

from bone_fx.passes.dropout import set_dropout
from bone_fx.train.called_graph import CalledGraph, latest_revision

_FORM = (
    *("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"),
    *("_graph", "_code", "_lineno_map", "_prologue_start", "_revision", "_switched"),
)


@dataclass(frozen=True)
class Form:
    """A graph, its module tree, and what was compiled of it."""

    attributes: dict[str, Any]
    forward: Callable[..., Any]


class ModelGraph(CalledGraph):
    """A GraphModule whose call is the model's, and which `train` and `eval` switch."""

    _switched: tuple[bool, int] | None = None  # the mode, and the latest revision of then

    def train(self, mode: bool = True) -> Self:
        """Switch the graph's dropout; calling it again changes nothing, and costs nothing."""
        self.training = mode
        if self._switched == (mode, latest_revision()):
            return self
        set_dropout(self, training=mode)
        for module in self.children():
            if not isinstance(module, fx.GraphModule):
                module.train(mode)
        self._switched = mode, latest_revision()
        return self

    def eval(self) -> Self:
        """Switch dropout off; calling it again changes nothing."""
        return self.train(mode=False)

    def _form(self) -> Form:
        """What `_take_form` needs to make this module again what it is now."""
        return Form({name: getattr(self, name) for name in _FORM}, type(self)._graph_forward)

    def _take_form(self, form: Form) -> None:
        """Be what this module was before. Nothing is compiled; `torch.compile` knows it again."""
        self.__dict__.update(form.attributes)
        type(self)._graph_forward = form.forward
