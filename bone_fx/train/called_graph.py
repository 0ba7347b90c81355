"""Graphs whose call is more than their generated forward: a layer that can be recomputed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import fx
from torch.utils.checkpoint import checkpoint

from bone_fx.lean.form import LAYER, PLAIN, running_form
from bone_fx.lean.recomputed_part import cut_recomputed

_REVISIONS = [0]


def latest_revision() -> int:
    """How many times a graph was compiled here."""
    return _REVISIONS[0]


class CalledGraph(fx.GraphModule):
    """A GraphModule whose call is `_call_model`, around the generated forward.

    `GraphModule.recompile` puts the generated forward on a class of each instance; here it becomes
    `_graph_forward` (flat tensors in, flat tensors out), and the subclass's `_call_model` is the
    forward.
    """

    _graph_forward: ClassVar[Callable[..., Any]]
    _call_model: Callable[..., Any]
    _revision: int

    def recompile(self) -> Any:
        """Compile the running form; the module's own call stays around the generated forward."""
        shown = self._graph
        running = self._graph = self._as_it_runs(shown)
        try:
            code = super().recompile()
        finally:
            self._graph = shown
        cls = type(self)
        _REVISIONS[0] += 1
        self._revision = _REVISIONS[0]
        if cls.forward is not cls._call_model:
            cls._graph_forward = cls.forward
            cls.forward = cls._call_model
        self._compiled(running)
        return code

    def _run(self, *args: Any) -> Any:
        """The graph as it is now."""
        self._watch()
        return self._graph_forward(*args)

    def _watch(self) -> None:
        """Let `torch.compile` compile again when the graph was written anew.

        It does not watch functions of a class, but it does watch the numbers that a call reads.
        """
        if self._revision < 0:
            raise AssertionError

    def _compiled(self, running: fx.Graph) -> None:
        """What else is made of the graph that was compiled."""

    def _as_it_runs(self, graph: fx.Graph) -> fx.Graph:
        """The graph that is compiled; people and passes see the one it is given."""
        return running_form(graph, PLAIN)


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
    _recomputed_forward: ClassVar[Callable[..., Any]]
    _rest_forward: ClassVar[Callable[..., Any] | None]

    def _compiled(self, running: fx.Graph) -> None:
        cls = type(self)
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        parts = cut_recomputed(running, trained)
        if parts is None:
            cls._recomputed_forward, cls._rest_forward = cls._graph_forward, None
            return
        # The functions find the parameters in this module; the modules that they come from go.
        recomputed, rest = (type(fx.GraphModule(self, part)).forward for part in parts)
        cls._recomputed_forward, cls._rest_forward = recomputed, rest

    def _call_model(self, *args: Any) -> Any:
        if self.checkpointing is None or not self.recomputable or not torch.is_grad_enabled():
            return self._run(*args)
        self._watch()
        forward = self._recomputed_forward
        values = checkpoint(forward, *args, use_reentrant=False, **self.checkpointing)
        return values if self._rest_forward is None else self._rest_forward(*values)


class LeanLayerGraph(LayerGraph):
    """A layer that runs in the form that keeps less for backward."""

    def _as_it_runs(self, graph: fx.Graph) -> fx.Graph:
        return running_form(graph, LAYER)
