"""`FoldedModule`: a plain traced model with folded weights, called like the model it came from."""

from __future__ import annotations

from typing import Any

from torch import fx

from bone_fx.capture.call.signature import CallSignature
from bone_fx.graphs import adopt_state
from bone_fx.train.model_graph import ModelGraph


class FoldedModule(ModelGraph):
    """A plain traced model with folded weights, called like the model it came from."""

    signature: CallSignature

    def __init__(
        self, graph_module: fx.GraphModule, signature: CallSignature, *, training: bool = False
    ) -> None:
        super().__init__(graph_module, graph_module.graph, "FoldedModule")
        self.signature = signature
        adopt_state(self, graph_module)
        self.train(training)

    def _call_model(self, *args: Any, **kwargs: Any) -> Any:
        return self.signature.pack(self._run(*self.signature.bind(*args, **kwargs)))
