"""`FoldedModule`: a plain traced model with folded weights, called like the model it came from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Self

from torch import fx

from bone_fx.capture.signature import CallSignature
from bone_fx.passes.dropout import set_dropout
from bone_fx.passes.frame import adopt_state


class FoldedModule(fx.GraphModule):
    """A plain traced model with folded weights, called like the model it came from."""

    signature: CallSignature
    _graph_forward: ClassVar[Callable[..., Any]]

    def __init__(
        self, graph_module: fx.GraphModule, signature: CallSignature, *, training: bool = False
    ) -> None:
        super().__init__(graph_module, graph_module.graph, "FoldedModule")
        self.signature = signature
        adopt_state(self, graph_module)
        self.train(training)

    def train(self, mode: bool = True) -> Self:
        """Switch the graph's dropout; calling it again changes nothing."""
        self.training = mode
        set_dropout(self, training=mode)
        return self

    def eval(self) -> Self:
        """Switch dropout off; calling it again changes nothing."""
        return self.train(mode=False)

    def recompile(self) -> Any:
        """Compile the graph; the model's own call stays around the generated forward."""
        code = super().recompile()
        cls = type(self)
        if cls.forward is not FoldedModule._call_model:
            cls._graph_forward = cls.forward
            cls.forward = FoldedModule._call_model
        return code

    def _call_model(self, *args: Any, **kwargs: Any) -> Any:
        return self.signature.pack(self._graph_forward(*self.signature.bind(*args, **kwargs)))
