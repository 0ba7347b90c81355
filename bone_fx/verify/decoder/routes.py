"""The experts that a graph chooses for each token, given to the reference.

Two experts of nearly one score change places when activations are rounded, and the token's output
with them: neither graph nor reference is wrong. So the reference takes the graph's experts, with
scores of its own, where its scores allow that choice; else the router is wrong, and is named. Every
token is then held to the tolerance.

Shape letters: B batch, S tokens, X experts, C chosen ones, those of several groups side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import onnx
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from bone_fx.errors import LOOK, VerificationError
from bone_fx.verify.graph import Edit, WrittenGraph

Routes = list[Tensor]
"""What each `topk` of a model chooses for each token of a text in turn, `[S, C]`."""

_SUM = 1e-3
"""How far probabilities may add up to something else than 1."""


@dataclass(frozen=True)
class Choices:
    """The nodes of a graph that choose experts.

    Attributes:
        scores: Names of the scores that a MoE reads, by that of an output that shows them.
        taken: How many experts each node takes, by the output that shows them or their scores, in
            the order of the graph; 0 for a TopK, which gives their indices.
        last_of_equals: Whether a MoE takes the last of equal scores, as ONNX Runtime's kernel for
            the CPU does; that for CUDA takes the first.
    """

    scores: Mapping[str, str]
    taken: Mapping[str, int]
    last_of_equals: bool

    @classmethod
    def of(cls, graph: WrittenGraph, edits: Sequence[Edit]) -> Choices:
        """Those of a graph, or of what edits leave of it."""
        model = graph.read()
        for edit in edits:
            edit(model)
        scores, taken = {}, {}
        for node in model.graph.node:
            if node.op_type == "TopK":
                taken[node.output[1]] = 0
            elif node.op_type in ("MoE", "QMoE"):
                output = f"{node.output[0]}.scores"
                scores[output] = node.input[1]
                taken[output] = next((a.i for a in node.attribute if a.name == "k"), 1)
        return cls(scores, taken, graph.provider == "cpu")

    @property
    def edits(self) -> tuple[Edit, ...]:
        """The edit that makes them outputs; none for a graph without experts."""
        return (self._add_outputs,) if self.taken else ()

    def _add_outputs(self, model: onnx.ModelProto) -> None:
        # ONNX Runtime drops a cast to fp16 and back between operators that it runs in float32: in
        # float32, these are the scores that the MoE reads.
        to = onnx.TensorProto.FLOAT
        model.graph.node.extend(
            onnx.helper.make_node("Cast", [name], [output], to=to)
            for output, name in self.scores.items()
        )
        model.graph.output.extend(map(onnx.helper.make_empty_tensor_value_info, self.taken))

    def read(self, outputs: Mapping[str, Any], shape: tuple[int, ...]) -> list[Tensor]:
        """What each of them chose in a run on `[B, S]` tokens, `[B, S, C]`."""
        tensors = {name: torch.from_numpy(outputs[name]) for name in self.taken}
        return [
            (self._best(tensors[name], k) if k else tensors[name]).reshape(*shape, -1)
            for name, k in self.taken.items()
        ]

    def _best(self, scores: Tensor, k: int) -> Tensor:
        if not self.last_of_equals:
            return scores.argsort(dim=-1, descending=True, stable=True)[..., :k]
        order = scores.flip(-1).argsort(dim=-1, descending=True, stable=True)
        return scores.shape[-1] - 1 - order[..., :k]


class Routed(TorchFunctionMode):
    """While open, every `topk` along the last axis chooses for each token what it is told to.

    Scores may lie off by the tolerance of the largest difference of a token's scores: as far as an
    output may. Probabilities of a softmax are told apart by their logarithms.

    Args:
        model: The reference; it runs one text.
        tokens: S.
        routes: What is to be chosen; shorter where the rest is the model's own choice.
        tolerance: Largest difference of an output, relative to its largest value; without end if
            every choice is allowed.
        case: What is run, for messages.

    Raises:
        VerificationError: A choice that the scores do not allow, in the call that makes it.
    """

    def __init__(
        self,
        model: nn.Module,
        tokens: int,
        routes: Sequence[Tensor],
        tolerance: float = math.inf,
        case: str = "",
    ) -> None:
        super().__init__()
        self._tokens = tokens
        self.made: Routes = []
        """What was chosen."""
        self._case = case
        self._routes = routes
        self._tolerance = tolerance
        self._names = {id(module): name for name, module in model.named_modules()}
        self._name = ""

    def __enter__(self) -> Self:
        """Open, and follow which module runs."""
        self._handle = register_module_forward_pre_hook(self._entered)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        """Close."""
        self._handle.remove()
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Make the call, and change what it chose."""
        del types
        result = func(*args, **(kwargs or {}))
        if func in (torch.topk, Tensor.topk):
            return self._chosen(result, *args, **(kwargs or {}))
        return result

    def _entered(self, module: nn.Module, _: object) -> None:
        self._name = self._names.get(id(module), self._name)

    def _chosen(
        self, own: Any, input: Tensor, k: int, dim: int = -1, largest: bool = True, **_: Any
    ) -> Any:
        del k
        if dim % input.dim() != input.dim() - 1 or not largest:
            return own
        indices_SC = own.indices.reshape(self._tokens, -1)
        number = len(self.made)
        if number < len(self._routes):
            told_SC = self._routes[number]
            if told_SC.shape[1] == indices_SC.shape[1]:
                indices_SC = torch.cat((told_SC, indices_SC[len(told_SC) :]))
                self._check(input.float(), indices_SC.reshape(own.indices.shape))
            elif self._tolerance < math.inf:
                raise self._error(
                    "tokens go to another number of experts",
                    expected=str(indices_SC.shape[1]),
                    found=str(told_SC.shape[1]),
                )
        self.made.append(indices_SC)
        indices = indices_SC.reshape(own.indices.shape)
        return torch.return_types.topk((input.gather(-1, indices), indices))

    def _check(self, scores: Tensor, indices: Tensor) -> None:
        if bool(scores.min() >= 0) and float((scores.sum(-1) - 1).abs().max()) < _SUM:
            scores = scores.log()
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, indices, True)
        worst, taken = scores.masked_fill(~chosen, math.inf).min(-1)
        best, left = scores.masked_fill(chosen, -math.inf).max(-1)
        # What another choice has ruled out, as of groups of experts, is -inf and no score.
        unknown = ~scores.isfinite()
        largest = scores.masked_fill(unknown, -math.inf).amax(-1)
        spread = largest - scores.masked_fill(unknown, math.inf).amin(-1)
        wrong = (best - worst > self._tolerance * spread).flatten()
        if bool(wrong.any()):
            place = int(wrong.int().argmax())
            token = place * self._tokens // len(wrong)
            expert, other, low, high = (
                t.flatten()[place].item() for t in (taken, left, worst, best)
            )
            raise self._error(
                f"token {token} goes to another expert",
                expected=f"expert {other}, whose score is {high:.4g}",
                found=f"expert {expert}, whose score is {low:.4g}",
            )

    def _error(self, what: str, expected: str, found: str) -> VerificationError:
        return VerificationError(
            f"verification failed: {self._case}: {self._name}: {what}",
            expected=expected,
            found=found,
            next_step=LOOK,
        )


def joined(pieces: Sequence[Sequence[Tensor]]) -> Routes:
    """What was chosen for the tokens of a text, of pieces `[S, C]` of it in their order."""
    return [torch.cat(of_choice) for of_choice in zip(*pieces, strict=True)]
