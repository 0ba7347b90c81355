"""A traced graph that is called like the model it came from, and switched like it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Self

from torch import fx

from bone_fx.passes.dropout import set_dropout


class ModelGraph(fx.GraphModule):
    """A GraphModule whose call is `_call_model`, around the generated forward.

    `GraphModule.recompile` puts the generated forward on a class of each instance; here it becomes
    `_graph_forward` (flat tensors in, flat tensors out), and the subclass's `_call_model` is the
    forward.
    """

    _graph_forward: ClassVar[Callable[..., Any]]
    _call_model: Callable[..., Any]

    def train(self, mode: bool = True) -> Self:
        """Switch the graph's dropout; calling it again changes nothing."""
        self.training = mode
        set_dropout(self, training=mode)
        for module in self.children():
            if not isinstance(module, fx.GraphModule):
                module.train(mode)
        return self

    def eval(self) -> Self:
        """Switch dropout off; calling it again changes nothing."""
        return self.train(mode=False)

    def recompile(self) -> Any:
        """Compile the graph; the model's own call stays around the generated forward."""
        code = super().recompile()
        cls = type(self)
        if cls.forward is not cls._call_model:
            cls._graph_forward = cls.forward
            cls.forward = cls._call_model
        return code
