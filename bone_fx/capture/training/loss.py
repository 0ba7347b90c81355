"""The loss that a transformers head computes, on its output and the labels, outside the graph.

Which loss a head has follows from the task that transformers' auto classes list it (or a class that
it is made from) under, so a renamed subclass has its parent's. Heads that call `self.loss_function`
have that very function called; the others compute a plain cross entropy in their forward, and so
does this. That is an inference from names in the forward's code: `capture.training.checked_loss`
compares it with what the model computes. A head whose loss needs more than its output and the
labels (CTC, detection, contrastive pre-training) has none here.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from bone_fx.capture.trace.hf_model import is_transformers_model
from bone_fx.capture.training.lazy_output import with_lazy_logits
from bone_fx.errors import UsageError
from bone_fx.operators import HeadInputs, linear_cross_entropy

_MANY_LABELS, _CALLS = 8, 4
"""From how many labels in a call one call is enough to check a loss, and how many calls else."""

Labels = torch.Tensor | Mapping[str, torch.Tensor]
_Compute = Callable[
    ["ModelLoss", Mapping[str, Any], Mapping[str, torch.Tensor], dict[str, Any]], torch.Tensor
]


@dataclass(frozen=True)
class ModelLoss:
    """The loss of one model, without the model.

    Attributes:
        label_names: The labels it takes: `("labels",)`, or the two positions of question answering.
        config: The model's config.
        function: The model's `loss_function` where its forward uses that, else None.
    """

    label_names: tuple[str, ...]
    compute: _Compute
    config: Any
    function: Callable[..., torch.Tensor] | None

    def __call__(self, output: Mapping[str, Any], labels: Labels, **options: Any) -> torch.Tensor:
        """The loss of `output`.

        Args:
            output: What the model gives back (a `ModelOutput`), without labels.
            labels: The labels, or for a head with several kinds a mapping from their names.
            **options: What the model's `loss_function` takes besides, such as `num_items_in_batch`;
                a head that computes its loss by itself takes no notice of them, as in transformers.

        Returns:
            A tensor of no dimensions.

        Raises:
            UsageError: Labels are missing.
        """
        by_name = self._by_name(labels)
        return self._with_auxiliary(self.compute(self, output, by_name, options), output)

    def _by_name(self, labels: Labels) -> Mapping[str, torch.Tensor]:
        by_name = labels if isinstance(labels, Mapping) else {self.label_names[0]: labels}
        missing = [name for name in self.label_names if by_name.get(name) is None]
        if missing:
            raise UsageError(
                f"the loss lacks {', '.join(missing)}", expected=", ".join(self.label_names)
            )
        return by_name

    def _with_auxiliary(self, loss: torch.Tensor, output: Mapping[str, Any]) -> torch.Tensor:
        auxiliary = output.get("aux_loss")
        coefficient = getattr(self.config, "router_aux_loss_coef", None)
        if auxiliary is None or coefficient is None:
            return loss
        total: torch.Tensor = loss + coefficient * auxiliary.to(loss.device)
        return total

    def made_up_labels(self, output: Mapping[str, Any]) -> list[dict[str, torch.Tensor]]:
        """Labels at random of the shape and kind that an output asks for, some to be ignored.

        Returns:
            The labels of one call; of several where a call has so few that most classes are absent.
        """
        generator = torch.Generator().manual_seed(0)
        logits: torch.Tensor = output["start_logits" if len(self.label_names) > 1 else "logits"]
        *shape, classes = logits.shape
        if self.compute is _classes and _is_float_kind(self.config):
            shape = shape if self.config.num_labels == 1 else [*shape, classes]
            values = torch.rand(shape, generator=generator).to(logits.device, logits.dtype)
            return [dict.fromkeys(self.label_names, values)]
        count = math.prod(shape)
        ignored = classes if self.compute is _span else -100
        calls = []
        for call in range(1 if count >= _MANY_LABELS else _CALLS):
            labels = {}
            for name in self.label_names:
                order = torch.randperm(classes, generator=generator)
                values = order[(torch.arange(count) + call * count) % classes]
                if call == 0:
                    values[:: max(2, count // 2)] = ignored
                labels[name] = values.reshape(shape).to(logits.device)
            calls.append(labels)
        return calls

    @property
    def counts_items(self) -> bool:
        """Whether `num_items_in_batch` changes the loss: only then is it summed over batches."""
        return self.compute is _tokens and self.function is not None

    def attach(
        self, output: Any, labels: Labels, head: HeadInputs | None = None, **options: Any
    ) -> Any:
        """`output` with the loss as its first field, as the model gives it back with labels.

        Args:
            output: What the model gives back without labels.
            labels: As for a call.
            head: The inputs of the head, if `output` has a placeholder for what it makes. The loss
                then takes a few rows of the logits at a time, and the output forms them when they
                are read.
            **options: As for a call.
        """
        if head is not None and output["logits"] is head.placeholder:
            loss = self._with_auxiliary(self._in_chunks(head, labels, **options), output)
            return with_lazy_logits(type(output)(loss=loss, **output), head.logits)
        if head is not None:  # not the one that makes the logits
            for name in [n for n, value in output.items() if value is head.placeholder]:
                output[name] = head.logits()
        return type(output)(loss=self(output, labels, **options), **output)

    @property
    def takes_head_inputs(self) -> bool:
        """Whether the loss is a cross entropy of tokens, which can be taken in chunks."""
        own = (self._is_shifted, self.function is None, self._is("ForMaskedLMLoss"))
        return self.compute is _tokens and any(own)

    @property
    def _is_shifted(self) -> bool:
        return self._is("ForCausalLMLoss")

    def _is(self, name: str) -> bool:
        """Whether the function is the one that transformers has, not one with that name."""
        from transformers.loss import loss_utils

        return self.function is not None and self.function is getattr(loss_utils, name, None)

    def _in_chunks(
        self,
        head: HeadInputs,
        labels: Labels,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        target = self._by_name(labels)["labels"]
        if self._is_shifted:
            target = functional.pad(target, (0, 1), value=-100)[..., 1:]
        divisor = None if self.function is None else num_items_in_batch
        loss = linear_cross_entropy(head.x, head.weight, head.bias, target, divisor)
        # transformers' functions compute in float32, a plain cross entropy in the logits' dtype.
        return loss.to(head.x.dtype) if self.function is None else loss


def loss_for(model: torch.nn.Module) -> ModelLoss | None:
    """The loss of `model` on its output and labels as far as names tell, or None if none does."""
    return next(iter(possible_losses(model)), None)


def possible_losses(model: torch.nn.Module) -> Iterator[ModelLoss]:
    """The losses that `model` can have on its output and labels, the likeliest first."""
    forward = inspect.unwrap(type(model).forward)
    uses = set(forward.__code__.co_names) | set(forward.__code__.co_varnames)
    task = _task_of(model)
    if task is None or uses & {"shift_logits", "shift_labels", "_compute_loss"}:
        return  # no loss, or one of its own, such as one that shifts by the attention mask
    name, label_names, compute = task
    by_itself = compute is _classes and "problem_type" not in uses
    plain = ModelLoss(label_names, _one_of if by_itself else compute, model.config, None)
    calls_function = "loss_function" in uses
    if name == "IMAGE_TEXT_TO_TEXT" and not calls_function:
        return
    if not calls_function:
        yield plain
    yield ModelLoss(label_names, compute, model.config, model.loss_function)  # type: ignore[arg-type]
    if calls_function:
        yield plain


def _task_of(model: torch.nn.Module) -> tuple[str, tuple[str, ...], _Compute] | None:
    """The row of `_TASKS` that the model's class, or one that it is made from, is listed under."""
    if not is_transformers_model(model):
        return None
    from transformers.models.auto import modeling_auto

    for parent in type(model).__mro__:
        for row in _TASKS:
            classes = getattr(modeling_auto, f"MODEL_FOR_{row[0]}_MAPPING_NAMES").values()
            if any(parent.__name__ in names for names in map(_as_tuple, classes)):
                return row
    return None


def _as_tuple(classes: str | tuple[str, ...]) -> tuple[str, ...]:
    return (classes,) if isinstance(classes, str) else tuple(classes)


def _tokens(
    loss: ModelLoss,
    output: Mapping[str, Any],
    labels: Mapping[str, torch.Tensor],
    options: dict[str, Any],
) -> torch.Tensor:
    """Language models; a head without `loss_function` has shifted inputs instead of labels."""
    logits: torch.Tensor = output["logits"]
    if loss.function is not None:
        return loss.function(
            logits=logits, labels=labels["labels"], vocab_size=logits.shape[-1], **options
        )
    return _one_of(loss, output, labels, options)


def _one_of(
    loss: ModelLoss,
    output: Mapping[str, Any],
    labels: Mapping[str, torch.Tensor],
    options: dict[str, Any],
) -> torch.Tensor:
    """A plain cross entropy over the last dimension."""
    logits: torch.Tensor = output["logits"]
    return functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), labels["labels"].reshape(-1)
    )


def _token_classes(
    loss: ModelLoss,
    output: Mapping[str, Any],
    labels: Mapping[str, torch.Tensor],
    options: dict[str, Any],
) -> torch.Tensor:
    if loss.function is not None:
        return loss.function(output["logits"], labels["labels"], loss.config)
    return _one_of(loss, output, labels, options)


def _classes(
    loss: ModelLoss,
    output: Mapping[str, Any],
    labels: Mapping[str, torch.Tensor],
    options: dict[str, Any],
) -> torch.Tensor:
    """Regression, one class or many, by `config.problem_type` or else by the labels.

    The function is transformers' own. It writes the kind that it found into the config, so it
    gets a copy.
    """
    from transformers.loss.loss_utils import ForSequenceClassificationLoss

    function = loss.function or ForSequenceClassificationLoss
    logits: torch.Tensor = output["logits"]
    # The heads call it with one of two sets of names; both fit a function of transformers' own
    # signature.
    result: torch.Tensor = function(
        labels=labels["labels"], pooled_logits=logits, config=copy.copy(loss.config)
    )
    return result


def _is_float_kind(config: Any) -> bool:
    """Whether a classifier's labels are numbers: of a regression, or one for each of many."""
    kind = getattr(config, "problem_type", None)
    return kind in ("regression", "multi_label_classification") or (
        kind is None and config.num_labels == 1
    )


def _span(
    loss: ModelLoss,
    output: Mapping[str, Any],
    labels: Mapping[str, torch.Tensor],
    options: dict[str, Any],
) -> torch.Tensor:
    from transformers.loss import loss_utils

    function: Callable[..., torch.Tensor] = loss_utils.ForQuestionAnsweringLoss
    return function(
        output["start_logits"],
        output["end_logits"],
        labels["start_positions"],
        labels["end_positions"],
    )


_LABELS = ("labels",)
_SPAN = ("start_positions", "end_positions")

# The tasks of transformers' auto classes (`MODEL_FOR_<task>_MAPPING_NAMES`), each with the labels
# and the loss.
_TASKS: tuple[tuple[str, tuple[str, ...], _Compute], ...] = (
    ("CAUSAL_LM", _LABELS, _tokens),
    ("MASKED_LM", _LABELS, _tokens),
    ("SEQ_TO_SEQ_CAUSAL_LM", _LABELS, _tokens),
    ("SPEECH_SEQ_2_SEQ", _LABELS, _tokens),
    ("IMAGE_TEXT_TO_TEXT", _LABELS, _tokens),
    ("SEQUENCE_CLASSIFICATION", _LABELS, _classes),
    ("IMAGE_CLASSIFICATION", _LABELS, _classes),
    ("VIDEO_CLASSIFICATION", _LABELS, _classes),
    ("AUDIO_CLASSIFICATION", _LABELS, _classes),
    ("TOKEN_CLASSIFICATION", _LABELS, _token_classes),
    ("MULTIPLE_CHOICE", _LABELS, _one_of),
    ("NEXT_SENTENCE_PREDICTION", _LABELS, _one_of),
    ("QUESTION_ANSWERING", _SPAN, _span),
)
