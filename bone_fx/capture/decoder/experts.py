"""Mixtures of experts: the function that transformers calls while a decoder is captured.

It emits one node a mixture, with the routing that the model computed; `absorb_routing` makes ONNX
Runtime's MoE of it. What an expert does between its two products is recognised by what it computes;
where it is no SwiGLU, transformers' own batched products stay.

Shape letters: N tokens, X experts, C chosen experts a token, H hidden width, I inner width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot

from bone_fx.capture.decoder.ort_operators import Attribute, routed_experts
from bone_fx.capture.trace.outside_trace import untraced
from bone_fx.capture.trace.replacements import configured
from bone_fx.lower.absorb_routing import is_known_routing

BATCHED = "batched_mm"
"""The form of transformers' mixtures of experts that is ATen operators without a loop over data."""

IMPLEMENTATION = "bone_fx_experts"

_INNER = 64
_FAR = 1e6


@dataclass(frozen=True)
class SwiGlu:
    """`g * sigmoid(alpha * g) * (u + beta)`, with `g <= limit` and `-limit <= u <= limit`.

    Attributes:
        alpha: Factor inside of the sigmoid.
        beta: Added to `u`.
        limit: Bound of both; None for none.
        interleaved: `g` and `u` alternate; otherwise all of `g` stands before all of `u`.
    """

    alpha: float
    beta: float
    limit: float | None
    interleaved: bool

    def apply(self, gate_up: Tensor) -> Tensor:
        """The definition, from [N, 2 * I] to [N, I]."""
        if self.interleaved:
            gate, up = gate_up[..., ::2], gate_up[..., 1::2]
        else:
            gate, up = gate_up.chunk(2, dim=-1)
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return gate * torch.sigmoid(self.alpha * gate) * (up + self.beta)


def recognise_gate(experts: nn.Module) -> SwiGlu | None:
    """Compares what experts do between their products with SwiGLU; None where it is another gate.

    Args:
        experts: A module of transformers' experts interface. Its weights may be fake, they are not
            read.
    """
    return untraced(lambda: _probe(experts))


def _probe(experts: nn.Module) -> SwiGlu | None:
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(32, 2 * _INNER, generator=generator, dtype=torch.float64)
    data = torch.cat((data, data * 30.0))
    for interleaved in (False, True):

        def at(gate: float, up: float, interleaved: bool = interleaved) -> float:
            pair = torch.tensor([[gate], [up]], dtype=torch.float64).expand(2, _INNER)
            row = pair.T.reshape(1, -1) if interleaved else pair.reshape(1, -1)
            return float(experts._apply_gate(row.contiguous())[0, 0])  # type: ignore[operator]

        try:
            slope = at(1.0, 1.0) - at(1.0, 0.0)  # sigmoid(alpha)
            if not 0.0 < slope < 1.0:
                continue
            alpha = round(float(torch.logit(torch.tensor(slope, dtype=torch.float64))), 6)
            beta = round(at(1.0, 0.0) / slope, 6)
            bound = round(at(1.0, _FAR) / slope - beta, 4)
            limit = None if bound > _FAR / 2 else bound
            gate = SwiGlu(alpha, beta, limit, interleaved)
            actual = experts._apply_gate(data)  # type: ignore[operator]
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
            return None
        expected = gate.apply(data)
        if actual.shape == expected.shape and torch.allclose(
            actual, expected, rtol=1e-6, atol=1e-8
        ):
            return gate
    return None


def experts_forward(
    experts: Any, hidden_NH: Tensor, index_NC: Tensor, weights_NC: Tensor
) -> Tensor:
    """Emits one node for a mixture, or transformers' batched products where that is not possible.

    Args:
        experts: The module that holds the weights of all experts.
        hidden_NH: What the experts read.
        index_NC: The experts chosen for each token.
        weights_NC: Their weights.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    unusual = (
        not experts.has_gate
        or experts._is_expert_parallel
        or getattr(experts, "has_post_expert_norm", False)
    )
    known = not unusual and is_known_routing(_node_of(index_NC), _node_of(weights_NC))
    gate = recognise_gate(experts) if known else None
    if gate is None:
        output: Tensor = ALL_EXPERTS_FUNCTIONS[BATCHED](experts, hidden_NH, index_NC, weights_NC)
        return output
    up_XIH, down_XHI = experts.gate_up_proj, experts.down_proj
    if experts.is_transposed:
        up_XIH, down_XHI = up_XIH.transpose(1, 2), down_XHI.transpose(1, 2)
    up_bias, down_bias = None, None
    if experts.has_bias:
        up_bias, down_bias = experts.gate_up_proj_bias, experts.down_proj_bias
    if not gate.interleaved:
        up_XIH = _interleaved(up_XIH)
        up_bias = None if up_bias is None else _interleaved(up_bias)
    attributes: dict[str, Attribute] = {
        "k": int(index_NC.shape[1]),
        "activation_type": "swiglu",
        "activation_alpha": gate.alpha,
        "activation_beta": gate.beta,
        "swiglu_fusion": 1,  # interleaved: the only form of the kernel for the CPU
    }
    if gate.limit is not None:
        attributes["swiglu_limit"] = gate.limit
    return routed_experts(
        hidden_NH, (index_NC, weights_NC), (up_XIH, up_bias), (down_XHI, down_bias), attributes
    )


def _interleaved(stacked: Tensor) -> Tensor:
    """Rows of all gates, then of all ups, of each expert -> in turns."""
    experts, rows, *rest = stacked.shape
    pairs = stacked.reshape(experts, 2, rows // 2, *rest).transpose(1, 2)
    return pairs.reshape(experts, rows, *rest)


def _node_of(tensor: Tensor) -> Node | None:
    """The node whose value a tensor is in the graph that is being traced."""
    mode = get_proxy_mode()
    slot = None if mode is None else get_proxy_slot(tensor, mode.tracer, None)
    return None if slot is None else slot.proxy.node


@contextmanager
def experts_interface(model: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """While open, a model's mixtures of experts are what `forward` makes of them.

    Args:
        model: A transformers model; the configurations of all its parts are switched, and switched
            back.
        forward: What transformers calls with the experts, their input, the experts chosen for each
            token and their weights.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, forward)
    try:
        with configured(model, "_experts_implementation_internal", IMPLEMENTATION):
            yield
    finally:
        type(ALL_EXPERTS_FUNCTIONS)._global_mapping.pop(IMPLEMENTATION, None)
