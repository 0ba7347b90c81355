"""Norms: recognised by what they compute, emitted as an operator that ONNX Runtime has.

A module is a candidate by its form alone: no children, one `weight` vector, perhaps a `bias`. A
copy with random weights is run on random data and compared with the definitions below; what agrees
with none of them is left as it is, which is always right, only with more nodes.

Shape letters: N rows, W width.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bone_fx.capture.decoder.ort_operators import simplified_layer_norm
from bone_fx.capture.trace.outside_trace import untraced

PLUS_ONE = "weight_plus_one"


@dataclass(frozen=True)
class Derived:
    """A constant of the graph that is computed from one parameter.

    Attributes:
        source: Name of the parameter.
        function: What is done to it: `add_one`, the parameter plus 1.
        dtype: Dtype of the result.
    """

    source: str
    function: str
    dtype: torch.dtype


@dataclass(frozen=True)
class Norm:
    """What a norm module computes over its last axis: `x / sqrt(mean(x²) + epsilon) * scale`.

    Attributes:
        centred: The mean is taken from `x` first (layer norm).
        plus_one: The scale is `1 + weight`, not `weight`.
        epsilon: Added to the mean of squares.
    """

    centred: bool
    plus_one: bool
    epsilon: float

    def apply(self, x_NW: Tensor, weight_W: Tensor) -> Tensor:
        """The definition."""
        if self.centred:
            x_NW = x_NW - x_NW.mean(-1, keepdim=True)
        scale_W = weight_W + 1.0 if self.plus_one else weight_W
        return x_NW * torch.rsqrt(x_NW.pow(2).mean(-1, keepdim=True) + self.epsilon) * scale_W


def is_candidate(module: nn.Module) -> bool:
    """Whether the module has the form of a norm that is not already one ATen operator."""
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 1 or not weight.is_floating_point():
        return False
    if type(module) is nn.LayerNorm or module._modules:
        return False
    others = {name for name, p in module._parameters.items() if p is not None} - {"weight", "bias"}
    required = [
        p
        for p in inspect.signature(module.forward).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return not others and len(required) == 1


def recognise_norm(module: nn.Module) -> Norm | None:
    """Compares the module with the definitions on random data; None where it fits none.

    Args:
        module: A module for which `is_candidate` holds. Its weights may be fake, they are not read.
    """
    weight = module._parameters["weight"]
    assert weight is not None
    return untraced(lambda: _probe(module, int(weight.shape[0])))


def _probe(module: nn.Module, width: int) -> Norm | None:
    generator = torch.Generator().manual_seed(0)
    scale = torch.randn(width, generator=generator)
    twin = module.__class__.__new__(module.__class__)
    twin.__dict__ = dict(module.__dict__)
    twin._parameters = dict(module._parameters)
    twin._parameters["weight"] = nn.Parameter(scale, requires_grad=False)
    bias = twin._parameters.get("bias")
    offset = torch.zeros(width)
    if bias is not None:
        offset = torch.randn(width, generator=generator)
        twin._parameters["bias"] = nn.Parameter(offset, requires_grad=False)
    direction = torch.randn(3, width, generator=generator) + 0.25
    epsilons = {v for v in vars(module).values() if isinstance(v, float) and 0.0 < v < 0.1}
    for epsilon in sorted(epsilons):
        # the second probe has the size at which epsilon itself decides
        probes = [direction, direction * epsilon**0.5]
        try:
            outputs = [twin.forward(probe) for probe in probes]
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
            return None
        for centred, plus_one in ((False, False), (False, True), (True, False), (True, True)):
            norm = Norm(centred, plus_one, epsilon)
            expected = [norm.apply(p.double(), scale.double()) + offset for p in probes]
            if (centred or bias is None) and all(map(_agree, outputs, expected)):
                return norm
    return None


def _agree(output: object, expected: Tensor) -> bool:
    return (
        isinstance(output, Tensor)
        and output.shape == expected.shape
        and torch.allclose(output.double(), expected, rtol=1e-5, atol=1e-6)
    )


def recognise_norms(model: nn.Module) -> dict[str, Norm]:
    """The norms of a model that become one operator each, by the paths of their modules."""
    by_kind: dict[tuple[object, ...], Norm | None] = {}
    norms = {
        path: _recognise_once(module, by_kind)
        for path, module in model.named_modules()
        if "forward" not in vars(module) and is_candidate(module)
    }
    return {path: norm for path, norm in norms.items() if norm is not None}


def derived_constants(model: nn.Module, norms: Mapping[str, Norm]) -> dict[str, Derived]:
    """The constants `1 + weight` of such norms, by their names in the graph signature."""
    return {
        f"{path}.{PLUS_ONE}": Derived(
            f"{path}.weight", "add_one", _dtype_of_sum(model.get_submodule(path))
        )
        for path, norm in norms.items()
        if norm.plus_one
    }


@contextmanager
def norms_as_operators(model: nn.Module, norms: Mapping[str, Norm]) -> Iterator[None]:
    """While open, each recognised norm of a model emits one operator.

    A norm that multiplies by `1 + weight` gets a buffer `weight_plus_one` beside its weight for as
    long as the context is open, so that the sum is a constant of the graph and no node of it. In
    bfloat16, which has 8 bits for that sum, such a norm is computed in float32 between casts, as
    transformers and onnxruntime-genai's builder compute it.

    Args:
        model: The model; the forward of the recognised instances is replaced.
        norms: What `recognise_norms` gave for it.
    """
    modules = {model.get_submodule(path): norm for path, norm in norms.items()}
    try:
        for module, norm in modules.items():
            if norm.plus_one:
                weight = module._parameters["weight"]
                assert weight is not None
                plus_one = torch.empty_like(weight.detach(), dtype=_dtype_of_sum(module))
                module.register_buffer(PLUS_ONE, plus_one, persistent=False)
            _replace_forward(module, norm)
        yield
    finally:
        for module in modules:
            vars(module).pop("forward", None)
            module._buffers.pop(PLUS_ONE, None)
            module._non_persistent_buffers_set.discard(PLUS_ONE)


def _dtype_of_sum(module: nn.Module) -> torch.dtype:
    """Dtype of `1 + weight`."""
    weight = module._parameters["weight"]
    assert weight is not None
    return torch.float32 if weight.dtype == torch.bfloat16 else weight.dtype


def _recognise_once(
    module: nn.Module, by_kind: dict[tuple[object, ...], Norm | None]
) -> Norm | None:
    weight = module._parameters["weight"]
    assert weight is not None
    plain = {k: v for k, v in vars(module).items() if isinstance(v, int | float | str)}
    key = (type(module), tuple(weight.shape), "bias" in module._parameters, *sorted(plain.items()))
    if key not in by_kind:
        by_kind[key] = recognise_norm(module)
    return by_kind[key]


def _replace_forward(module: nn.Module, norm: Norm) -> None:
    def forward(x: Tensor) -> Tensor:
        plus_one = module._buffers.get(PLUS_ONE)
        if plus_one is not None and x.dtype == torch.bfloat16:
            return normalized(x.float(), plus_one.float()).to(x.dtype)
        weight: Tensor | None = module._parameters["weight"] if plus_one is None else plus_one
        assert weight is not None
        if weight.dtype != x.dtype:  # transformers keeps some norms in float32; operators do not
            weight = weight.to(x.dtype)
        return normalized(x, weight)

    def normalized(x: Tensor, weight: Tensor) -> Tensor:
        if norm.centred:
            bias: Tensor | None = module._parameters.get("bias")
            bias = None if bias is None else bias.to(x.dtype)
            return nn.functional.layer_norm(x, weight.shape, weight, bias, norm.epsilon)
        return simplified_layer_norm(x, weight, norm.epsilon)

    vars(module)["forward"] = forward
