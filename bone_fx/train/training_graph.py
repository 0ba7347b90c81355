"""What training asks of a graph besides its call: layers, recomputed activations, groups."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import torch
from torch import Tensor, fx, nn

from bone_fx.errors import UsageError
from bone_fx.lean.form import MODEL, running_form
from bone_fx.operators import forget_masks, head_inputs
from bone_fx.train.called_graph import LayerGraph, LeanLayerGraph
from bone_fx.train.model_graph import Form, ModelGraph
from bone_fx.train.mounting import carry_buffers, has_processes, named_buffers
from bone_fx.train.origin import Origin
from bone_fx.train.split_layers import layers_of, split_in_place


class TrainingGraph(ModelGraph):
    """A model's graph that can be split into its layers, one submodule each."""

    _origin: Origin
    _rebuild: Callable[[], None]
    _call_with_fused_head: Callable[..., Any]
    _fit_call: Callable[..., None]
    _forms: dict[Hashable, Form]  # of other active adapters, or without them, by what is on
    _split = False
    _checkpointing: dict[str, Any] | None = None
    _every = 1

    @property
    def config(self) -> Any:
        """The base model's configuration, or None."""
        return getattr(self._origin.model, "config", None)

    def _get_name(self) -> str:
        """The base model's class: `transformers.Trainer` decides by it whether labels shift."""
        model = self._origin.model
        return type(self if model is None else model).__name__

    @property
    def loss_type(self) -> str | None:
        """Which of transformers' losses the model has; `Trainer` counts a batch's items by it."""
        return getattr(self._origin.model, "loss_type", None)

    @property
    def label_names(self) -> tuple[str, ...]:
        """The labels that the model's loss takes; none where it is not known."""
        return () if self._origin.loss is None else self._origin.loss.label_names

    @property
    def accepts_loss_kwargs(self) -> bool:
        """What `transformers.Trainer` asks: whether the loss counts `num_items_in_batch`."""
        return self._origin.loss is not None and self._origin.loss.counts_items

    def layer_modules(self) -> list[LayerGraph]:
        """The model's layers as submodules, in the order in which they run.

        The first call splits the graph. A layer stands where the model had it (`model.layers.0`)
        and owns its parameters, under unchanged names; optimizers stay valid. For FSDP2, call
        `fully_shard` on each of them and then on this module.

        Raises:
            UsageError: The model has no list of modules that could be cut out.
        """
        if not self._split:
            self._set_split(True)
        layers = list(layers_of(self).values())
        if not layers:
            self._split = False
            raise UsageError(
                "the graph has no layers: no list of modules, or one that is called more than once",
                next_step="train without gradient checkpointing; shard the whole module",
            )
        return layers

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether backward recomputes the activations of the layers."""
        return self._checkpointing is not None

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
        *,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Recompute each layer's activations in backward instead of keeping them.

        Args:
            gradient_checkpointing_kwargs: For `torch.utils.checkpoint`; its reentrant form is
                refused. Dropout draws the same numbers again (`preserve_rng_state`).
            every_n_layers: Recompute the first of every so many layers, and keep the others'.
            offload: Not possible here; must be False.

        Raises:
            UsageError: The graph has no layers, or the reentrant form is asked for.
        """
        options = dict(gradient_checkpointing_kwargs or {})
        if options.pop("use_reentrant", False):
            raise UsageError(
                "reentrant checkpointing loses the gradients of blocks under a frozen base",
                expected="use_reentrant=False",
            )
        if offload or every_n_layers < 1:
            raise UsageError(
                "activations cannot be checkpointed so",
                expected="offload=False and every_n_layers >= 1",
                found=f"offload={offload}, every_n_layers={every_n_layers}",
            )
        self.layer_modules()
        self._checkpointing, self._every = options, every_n_layers
        self._set_checkpointing(self)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        """`gradient_checkpointing_enable` under the name that transformers gives it now."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, **options)

    def activation_checkpointing_disable(self) -> None:
        """`gradient_checkpointing_disable` under the name that transformers gives it now."""
        self.gradient_checkpointing_disable()

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again; the graph stays split."""
        self._checkpointing = None
        self._set_checkpointing(self)

    def parameter_groups(
        self, *, weight_decay: float = 0.0, lr: float | None = None
    ) -> list[dict[str, Any]]:
        """Trainable parameters for an optimizer: matrices decay, biases and norms do not.

        Args:
            weight_decay: Of blocks and of weights of two or more dimensions.
            lr: Learning rate of both groups; None leaves it to the optimizer.
        """
        trained = [p for p in self.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        rate = {} if lr is None else {"lr": lr}
        return [group | rate for group in groups if group["params"]]

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Numbers of trainable and of all parameters."""
        unique = {id(p): p for p in self.parameters()}.values()
        return sum(p.numel() for p in unique if p.requires_grad), sum(p.numel() for p in unique)

    def print_trainable_parameters(self) -> None:
        """Print the numbers of trainable and of all parameters, in PEFT's words."""
        trainable, total = self.get_nb_trainable_parameters()
        print(  # noqa: T201 - this is what the verb is for
            f"trainable params: {trainable:,d} || all params: {total:,d} || "
            f"trainable%: {100 * trainable / total:.4f}"
        )

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Read parameters and buffers into those that are here.

        Raises:
            UsageError: `assign=True`: adapters and the optimizers' parameters are these objects.
        """
        if assign:
            raise UsageError(
                "an adapted module keeps the parameters that it has",
                next_step="leave assign=True out: the values are copied",
            )
        return super().load_state_dict(state_dict, strict=strict)

    def _replicate_for_data_parallel(self) -> Any:
        raise UsageError(
            "torch.nn.DataParallel copies a module without its adapters",
            next_step="use DistributedDataParallel, one process a GPU",
        )

    def _call_model(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("fused_lm_head"):
            return self._call_with_fused_head(*args, **kwargs)
        forget_masks()
        self._fit_call(*args, **kwargs)
        origin = self._origin
        inputs = origin.signature.bind(*args, **kwargs)
        labels = origin.signature.labels_of(*args, **kwargs)
        if not labels:
            return origin.signature.pack(self._run(*inputs))
        if origin.loss is None:
            raise UsageError(
                f"the loss of {type(origin.model).__name__} is not known",
                expected="a loss of transformers on output and labels, as its forward computes it",
                next_step="leave the labels out and compute the loss on the output",
            )
        in_chunks = (
            not torch.compiler.is_compiling()
            and origin.loss.takes_head_inputs
            and not _is_fsdp(self)
        )
        context: AbstractContextManager[Any] = head_inputs() if in_chunks else nullcontext()
        with context as request:
            packed = origin.signature.pack(self._run(*inputs))
        head = None if request is None else request.inputs
        options = origin.signature.loss_options_of(kwargs)
        return origin.loss.attach(packed, labels, head, **options)

    def _as_it_runs(self, graph: fx.Graph) -> fx.Graph:
        return running_form(graph, MODEL)

    def _set_split(self, split: bool) -> None:
        if self.is_sharded:
            raise UsageError(
                "the module is sharded", next_step="call layer_modules() before fully_shard"
            )
        self._split = split
        self._rebuild()

    @property
    def is_sharded(self) -> bool:
        """Whether parameters are DTensors: under FSDP2 the set of adapters cannot change."""
        return has_processes() and any(
            hasattr(parameter, "full_tensor") for parameter in self.parameters()
        )

    def _swap_forms(self, leaving: Hashable, entering: Hashable) -> bool:
        """Be another form, and keep this one for the next time; False where there is none."""
        if entering not in self._forms or self.is_sharded:
            return False
        form, buffers = self._form(), named_buffers(self)
        self._take_form(self._forms.pop(entering))
        self._forms[leaving] = form
        carry_buffers(buffers, self)
        self._set_checkpointing(self)
        self.train(self.training)
        return True

    def _split_if_asked(self, root: fx.GraphModule) -> None:
        """Split a graph that was written anew, if this module is split."""
        if not self._split:
            return
        split_in_place(root, LeanLayerGraph)
        self._set_checkpointing(root)

    def _set_checkpointing(self, root: fx.GraphModule) -> None:
        for number, layer in enumerate(layers_of(root).values()):
            layer.checkpointing = self._checkpointing if number % self._every == 0 else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast parameters.

        Raises:
            UsageError: A cast of a graph in which the trace wrote the dtype down.
        """
        self._refuse_cast(fn)
        self._forms.clear()
        return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]

    def _refuse_cast(self, fn: Callable[[Tensor], Tensor]) -> None:
        parameter = next((p for p in self.parameters() if p.is_floating_point()), None)
        if parameter is None or parameter.is_meta or not _writes_dtype(self):
            return
        with torch.no_grad():
            now = fn(torch.empty(0, dtype=parameter.dtype, device=parameter.device)).dtype
        if now != parameter.dtype:
            raise UsageError(
                "the dtype of a captured graph cannot change: the trace wrote it down",
                expected=str(parameter.dtype),
                found=str(now),
                next_step=f"call model.to({now}) before adapt(), or train under torch.autocast",
            )


def _is_fsdp(module: nn.Module) -> bool:
    """Whether FSDP2 shards a module: its head's weight is gone once forward is over."""
    if torch.compiler.is_compiling() or not has_processes():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def sign_as(module: TrainingGraph, model: nn.Module | None) -> None:
    """Give a module's forward the signature of a model's, for those who look at it."""
    if model is None:
        return
    call: Any = TrainingGraph._call_model

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return call(self, *args, **kwargs)

    forward.__signature__ = inspect.signature(type(model).forward)  # type: ignore[attr-defined]
    type(module)._call_model = forward  # type: ignore[method-assign]


def refuse_hidden_names(kind: type[TrainingGraph], base: nn.Module) -> None:
    """Refuse parts of a model that an adapted module could not reach: its verbs come first.

    Raises:
        UsageError: A module, parameter or buffer at the root has the name of an attribute.
    """
    names = (*base._modules, *base._parameters, *base._buffers)
    hidden = [name for name in names if hasattr(kind, name)]
    if hidden:
        raise UsageError(
            f"the model has a part called {', '.join(hidden)}, as an adapted module has a verb",
            next_step="rename it, or adapt a module that holds the model",
        )


def _writes_dtype(module: nn.Module) -> bool:
    """Whether an operator of a graph has a floating dtype as a literal."""
    return any(
        isinstance(value, torch.dtype) and value.is_floating_point
        for graph in module.modules()
        if isinstance(graph, fx.GraphModule)
        for node in graph.graph.nodes
        for value in (*node.args, *node.kwargs.values())
    )
