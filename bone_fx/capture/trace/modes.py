"""Differences between training and evaluation, other than dropout, that a graph must not hide.

A graph holds one path through the model. Where the model draws its path (LayerDrop), its input
(SpecAugment) or its noise while training, the graph with dropout off is not the model in evaluation
mode, and the capture is refused with the setting that avoids it.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from bone_fx.capture.trace.examples import Examples
from bone_fx.capture.trace.hf_model import configs_of, without_cache
from bone_fx.errors import CaptureError
from bone_fx.passes.dropout import random_nodes, set_dropout


def _positive(value: Any, _: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _spec_augment(value: Any, config: Any) -> bool:
    fields = ("mask_time_prob", "mask_feature_prob")
    return bool(value) and any(_positive(getattr(config, field, None), None) for field in fields)


def _is(*values: str) -> Callable[[Any, Any], bool]:
    return lambda value, _: value in values


def _eager_experts(value: Any, config: Any) -> bool:
    return value == "eager" and any("experts" in name for name in config.to_dict())


# A field of a transformers config, when it is in the way, what avoids it, and why.
_SETTINGS: tuple[tuple[str, Callable[[Any, Any], bool], str, str], ...] = (
    ("layerdrop", _positive, "layerdrop=0", "LayerDrop draws which layers run"),
    ("encoder_layerdrop", _positive, "encoder_layerdrop=0", "LayerDrop draws which layers run"),
    ("decoder_layerdrop", _positive, "decoder_layerdrop=0", "LayerDrop draws which layers run"),
    (
        "apply_spec_augment",
        _spec_augment,
        "apply_spec_augment=False",
        "SpecAugment masks the input while training",
    ),
    (
        "drop_path_rate",
        _positive,
        "drop_path_rate=0",
        "stochastic depth draws which rows skip a layer",
    ),
    (
        "router_jitter_noise",
        _positive,
        "router_jitter_noise=0",
        "the router adds noise while training",
    ),
    (
        "input_jitter_noise",
        _positive,
        "input_jitter_noise=0",
        "the router's input is scaled by noise while training",
    ),
    (
        "_experts_implementation",
        _eager_experts,
        'experts_implementation="grouped_mm"',
        "experts loop over tokens",
    ),
    (
        "_attn_implementation",
        _is("flash_attention_2", "flash_attention_3", "flex_attention"),
        'attn_implementation="sdpa"',
        "this attention cannot be traced",
    ),
)

# Largest allowed difference from the model in evaluation mode, relative to its largest output.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


def refuse_checkpointing(model: torch.nn.Module) -> None:
    """Raises `CaptureError` if transformers' gradient checkpointing is on: a trace loses it."""
    if any(getattr(module, "gradient_checkpointing", False) is True for module in model.modules()):
        raise CaptureError(
            f"gradient checkpointing is on in {type(model).__name__}: a graph would not have it",
            expected="a model without gradient checkpointing",
            next_step="call model.activation_checkpointing_disable() before",
        )


def settings_to_blame(model: torch.nn.Module) -> str | None:
    """Which of the model's settings are known to make its forward differ from call to call."""
    blamed = {
        avoid: why
        for config in configs_of(model)
        for name, in_the_way, avoid, why in _SETTINGS
        if in_the_way(getattr(config, name, None), config)
    }
    if not blamed:
        return None
    return "; ".join(f"set {avoid} in the config ({why})" for avoid, why in blamed.items())


@contextmanager
def refuse_draws(model: torch.nn.Module) -> Iterator[None]:
    """Raises `CaptureError` if a trace draws from Python's or numpy's generator: it keeps one draw.

    However improbable the other path is: LayerDrop and SpecAugment do so in some models.
    """
    before = _generators()
    yield
    if _generators() != before:
        raise CaptureError(
            f"{type(model).__name__} draws random numbers outside of torch while training: "
            "a graph would hold one draw",
            expected="a forward without Python's random and without numpy.random",
            next_step=settings_to_blame(model)
            or "switch off what draws, or draw with torch and without a branch",
        )


_DERIVATIVES = frozenset({"transformers.models.bloom.modeling_bloom.GeLUFunction"})
"""Functions whose backward is the derivative of their forward."""


_ONE_AT_A_TIME = threading.RLock()
"""Held while the two methods of torch are other ones, so that each trace restores the originals."""


@contextmanager
def refuse_own_backward(model: torch.nn.Module) -> Iterator[None]:
    """While open, refuses what changes gradients: a graph holds the forward, and derives those.

    PyTorch's own functions are let through, and those of `_DERIVATIVES`. No mode of PyTorch sees
    `Function.apply` (torch 2.13), so it is another method meanwhile, which does as before for every
    thread but this one.

    Raises:
        CaptureError: A module has a backward hook, or the forward calls a `torch.autograd.Function`
            or hooks a tensor.
    """
    for name, module in model.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            raise _own_backward(model, f"{name or 'the model'} has a backward hook")
    function, tensor, tracing = torch.autograd.Function, torch.Tensor, threading.get_ident()

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        name = f"{cls.__module__}.{cls.__qualname__}"
        allowed = name.startswith("torch.") or name in _DERIVATIVES
        if not allowed and threading.get_ident() == tracing:
            raise _own_backward(model, f"its forward calls {name}")
        return before[0].__get__(None, cls)(*args, **kwargs)

    def register_hook(self: torch.Tensor, hook: Any) -> Any:
        if threading.get_ident() == tracing:
            raise _own_backward(model, "its forward hooks the gradient of a tensor")
        return before[1](self, hook)

    with _ONE_AT_A_TIME:
        before = function.__dict__["apply"], tensor.__dict__["register_hook"]
        function.apply = classmethod(apply)  # type: ignore[assignment]
        tensor.register_hook = register_hook  # type: ignore[method-assign]
        try:
            yield
        finally:
            function.apply, tensor.register_hook = before  # type: ignore[method-assign]


def _own_backward(model: torch.nn.Module, cause: str) -> CaptureError:
    return CaptureError(
        f"{type(model).__name__} has a backward of its own, and its graph would not: {cause}",
        expected="gradients that follow from the forward",
        next_step="write it with detach(), as in x + (f(x) - x).detach(), or leave it out",
    )


def _generators() -> tuple[Any, ...]:
    import numpy as np

    state: Any = np.random.get_state()
    return random.getstate(), state[1].tobytes(), state[2]


def require_same_evaluation(
    model: torch.nn.Module, graph_module: GraphModule, examples: Examples
) -> Any:
    """Runs the model in evaluation mode and the graph with dropout off on the examples.

    Returns:
        The model's output.

    Raises:
        CaptureError: They differ, or the graph draws random numbers with dropout off.
    """
    model.eval()
    set_dropout(graph_module, False)
    drawing = random_nodes(graph_module)

    def evaluate() -> tuple[Any, Any]:
        inputs = pytree.tree_leaves(list(examples.inputs.values()))
        return examples.call(model), graph_module(*inputs)

    output = gap = None
    try:
        with torch.no_grad(), without_cache(model):
            if not drawing:
                output, gap = _output_and_gap(evaluate)
    finally:
        set_dropout(graph_module, True)
        model.train()
    if drawing:
        gap = f"it draws random numbers by {drawing[0].target}{_place(drawing[0])}"
    if gap is not None:
        raise CaptureError(
            f"{type(model).__name__} in evaluation mode is not its graph with dropout off: {gap}",
            expected="a model whose modes differ by dropout and batch norm only",
            next_step=settings_to_blame(model)
            or "switch off what reads self.training or draws random numbers in its forward",
        )
    return output


def _output_and_gap(evaluate: Callable[[], tuple[Any, Any]]) -> tuple[Any, str | None]:
    """The model's output, how the graph's differs from it, and which of them are not steady."""
    first = evaluate()
    gap = _gap(*first)
    if gap is not None:
        for who, one, other in zip(("model", "graph"), first, evaluate(), strict=True):
            change = _gap(one, other)
            if change is not None:
                gap += f"; evaluated again on the same inputs, the {who} itself changes: {change}"
    return first[0], gap


def _place(node: Node) -> str:
    """In which of the model's modules a node stands."""
    entries = list((node.meta.get("nn_module_stack") or {}).values())
    return f" in {entries[-1][0]}" if entries and entries[-1][0] else ""


def _gap(expected_output: Any, actual_output: Any) -> str | None:
    expected, got = pytree.tree_leaves(expected_output), pytree.tree_leaves(actual_output)
    if len(expected) != len(got):
        return f"{len(expected)} outputs against {len(got)}"
    for index, (a, b) in enumerate(zip(expected, got, strict=True)):
        if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
            continue
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"output {index}: {a.dtype} {list(a.shape)} against {b.dtype} {list(b.shape)}"
        if a.numel() == 0 or not (a.is_floating_point() or a.is_complex()):
            continue
        scale = a.abs().nan_to_num(0, 0, 0).max().item()
        difference = (a - b).abs()[~(a.isnan() & b.isnan()) & (a != b)]
        limit = _TOLERANCE.get(a.dtype, 1e-4) * max(scale, 1e-6)
        if difference.numel() and not bool((difference <= limit).all()):
            return f"output {index} differs by {difference.max().item():.3g}, allowed {limit:.3g}"
    return None
