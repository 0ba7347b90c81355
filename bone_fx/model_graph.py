"""A traced graph that is called like the model it came from, and switched like it."""

from __future__ import annotations

from typing import Self

from torch import fx

from bone_fx.passes.dropout import set_dropout
from bone_fx.passes.layer_graph import CalledGraph


class ModelGraph(CalledGraph):
    """A GraphModule whose call is the model's, and which `train` and `eval` switch."""

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
