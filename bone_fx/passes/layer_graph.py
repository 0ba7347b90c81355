"""Graphs whose call is more than their generated forward: a layer that can be recomputed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import fx
from torch.utils.checkpoint import checkpoint


class CalledGraph(fx.GraphModule):
    """A GraphModule whose call is `_call_model`, around the generated forward.

    `GraphModule.recompile` puts the generated forward on a class of each instance; here it becomes
    `_graph_forward` (flat tensors in, flat tensors out), and the subclass's `_call_model` is the
    forward.
    """

    _graph_forward: ClassVar[Callable[..., Any]]
    _call_model: Callable[..., Any]

    def recompile(self) -> Any:
        """Compile the graph; the module's own call stays around the generated forward."""
        code = super().recompile()
        cls = type(self)
        if cls.forward is not cls._call_model:
            cls._graph_forward = cls.forward
            cls.forward = cls._call_model
        return code


class LayerGraph(CalledGraph):
    """One layer of a split graph.

    Attributes:
        recomputable: False for a layer that writes to what it was given (running statistics): run
            twice it would write twice.
        checkpointing: Options of `torch.utils.checkpoint` while activations are recomputed in
            backward, or None while they are kept.
    """

    recomputable: bool = True
    checkpointing: dict[str, Any] | None = None

    def _call_model(self, *args: Any) -> Any:
        if self.checkpointing is None or not self.recomputable or not torch.is_grad_enabled():
            return self._graph_forward(*args)
        return checkpoint(self._graph_forward, *args, use_reentrant=False, **self.checkpointing)
