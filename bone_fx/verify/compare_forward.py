"""Verification of a graph without a cache: encoders, heads, and users' own modules.

The inputs of a case are the examples resized along the graph's own dynamic dimensions: batches of
one and three, three lengths, and for a mask rows padded on the right and on the left. A model of
texts is asked about one token, many, and the lengths its configuration names besides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bone_fx.errors import VerificationError, first_line
from bone_fx.verify.cases import LONGEST, edges, vocabulary_of
from bone_fx.verify.compare_quantized import ROUNDED_ACTIVATIONS, Written
from bone_fx.verify.graph import Edit, WrittenGraph, keep_activations
from bone_fx.verify.locate import first_difference, located
from bone_fx.verify.parity import SMALLEST, TOLERANCE, Parity, check_effect
from bone_fx.verify.ranges import within_range
from bone_fx.verify.reference import Adapters, fold_in_place, load_parameters, unmerged

if TYPE_CHECKING:
    import onnxruntime

Feeds = dict[str, Tensor]
_SIZES = ((1, 5), (3, 11), (3, 7))
_MASK = "attention_mask"
_EXAMPLE = "the example"


def verify_model(
    graph: WrittenGraph,
    model: nn.Module,
    adapters: Adapters,
    examples: Feeds,
    *,
    dtype: str,
    short: bool = False,
    written: Written | None = None,
) -> Parity:
    """Compare a graph with a transformers model under its adapters.

    Args:
        graph: The exported graph; inputs are named as the model's arguments, outputs as its
            output's fields.
        model: The base model in float32 and eval mode; it is folded in place and must not be used
            afterwards.
        adapters: The adapters as verification read them, in the order in which they apply.
        examples: One tensor an input; what varies is resized.
        dtype: `"fp32"` or `"fp16"`, which sets the tolerance.
        short: Leave out the lengths that a text's model is asked about besides.
        written: The graph's quantized weights; the graph is then held to torch with these.

    Raises:
        VerificationError: Two of the three disagree, or a value is not finite.
    """
    parity = Parity(TOLERANCE[dtype], SMALLEST[dtype])
    session = graph.session()
    cases = _cases(session, examples)
    names = [output.name for output in session.get_outputs()]

    def run() -> list[list[Tensor]]:
        return [_outputs(model, case, feeds, names) for case, feeds in cases.items()]

    with torch.no_grad():
        if not short:
            cases |= _longer(parity, session, model, examples)
        cases = {case: _ended(feeds, model) for case, feeds in cases.items()}
        base = run() if adapters else []
        load_parameters(model, adapters)
        with unmerged(model, adapters), within_range(model, dtype):
            reference = run()
        fold_in_place(model, adapters)
        folded = run() if adapters else reference
        if written is not None:
            written.load_into(model)
            quantized = run()
    free = parity.tolerance if written is None else math.inf
    compared: list[tuple[str, tuple[Edit, ...], list[list[Tensor]], float]] = [
        ("onnx_vs_unmerged", (), reference, free),
        ("onnx_vs_folded", (), folded, free),
    ]
    if written is not None:
        edits: tuple[Edit, ...] = (keep_activations,) if graph.rounds_activations() else ()
        compared.append(("onnx_vs_written", edits, quantized, parity.tolerance))
        if edits:
            compared.append(("rounded_activations", (), quantized, ROUNDED_ACTIVATIONS))
    for (case, feeds), ones, others in zip(cases.items(), folded, reference, strict=True):
        for name, one, other in zip(names, ones, others, strict=True):
            both = _kept(feeds.get(_MASK), one, other)
            parity.compare("unmerged_vs_folded", f"{case}: {name}", *both, TOLERANCE["fp32"])
    for pair, edits, expected, tolerance in compared:
        edited = graph.session(*edits) if edits else session
        for (case, feeds), values in zip(cases.items(), expected, strict=True):
            outputs = run_session(edited, feeds)
            for name, actual, value in zip(names, outputs, values, strict=True):
                both = _kept(feeds.get(_MASK), actual, value)
                try:
                    parity.compare(pair, f"{case}: {name}", *both, tolerance)
                except VerificationError as error:
                    where = _where(graph, edits, model, feeds, tolerance)
                    raise located(error, where) from None
    pairs = [
        (a, b)
        for one, other in zip(base, reference, strict=False)
        for a, b in zip(one, other, strict=True)
    ]
    check_effect(parity, pairs)
    return parity


def _outputs(model: nn.Module, case: str, feeds: Feeds, names: Sequence[str]) -> list[Tensor]:
    try:
        return _fields(model(**feeds), names)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise VerificationError(
            f"verification failed: the model itself refuses {case}",
            expected="inputs that both can be run on",
            found=first_line(error),
            next_step="--verify off publishes without a comparison, and says so",
        ) from error


def _where(
    graph: WrittenGraph, edits: Sequence[Edit], model: nn.Module, feeds: Feeds, tolerance: float
) -> str | None:
    """The first layer that differs in a case."""
    return first_difference(
        graph,
        edits,
        model,
        lambda session: [value.numpy() for value in run_session(session, feeds)],
        lambda: model(**feeds),
        tolerance,
    )


def _longer(
    parity: Parity, session: onnxruntime.InferenceSession, model: nn.Module, examples: Feeds
) -> dict[str, Feeds]:
    """More cases of a text's model: one token, many, and beyond each length the model names.

    What the model itself does not take is left out.
    """
    config: Any = model.config
    ids = [name for name in examples if name.endswith("input_ids")]
    if not ids:
        return {}
    vocabulary = vocabulary_of(model)
    lengths = [n + 3 for n in edges(config, LONGEST)]
    cases = _cases(session, examples, [(1, 1), (2, 64), *((2, length) for length in lengths)])
    generator = torch.Generator().manual_seed(1)
    taken = {}
    for case, feeds in cases.items():
        for name in ids:
            shape = feeds[name].shape
            feeds[name] = torch.randint(0, vocabulary, shape, generator=generator)
        try:
            model(**feeds)
        except Exception as error:  # noqa: BLE001 - a model may refuse a length in any way
            parity.skip(case, f"the model refuses it: {first_line(error)}")
        else:
            taken[case] = feeds
    return taken


def verify_module(
    session: onnxruntime.InferenceSession, call: Callable[..., Any], examples: Any, *, dtype: str
) -> Parity:
    """Compare a session with a user's own module or graph.

    Args:
        session: The exported graph; its inputs stand in the order of the tensors in `examples`.
        call: The module.
        examples: The arguments of one call: a tensor, a sequence by position, or a mapping by name.
        dtype: `"fp32"` or `"fp16"`, which sets the tolerance.

    Raises:
        VerificationError: They disagree, or a value is not finite.
    """
    parity = Parity(TOLERANCE[dtype], SMALLEST[dtype])
    leaves, spec = pytree.tree_flatten((examples,) if isinstance(examples, Tensor) else examples)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    names = [value.name for value in session.get_inputs()]
    cases = {_EXAMPLE: dict(zip(names, tensors, strict=True))}
    cases |= _cases(session, cases[_EXAMPLE])
    for case, feeds in cases.items():
        values = iter(feeds.values())
        arguments = pytree.tree_unflatten(
            [next(values) if isinstance(x, Tensor) else x for x in leaves], spec
        )
        try:
            with torch.no_grad():
                result = call(**arguments) if isinstance(arguments, Mapping) else call(*arguments)
        except Exception as error:
            if case == _EXAMPLE:
                raise
            parity.warnings.append(
                f"not compared at {case}: the module refuses it ({first_line(error)})"
            )
            continue
        expected = [v for v in pytree.tree_leaves(result) if isinstance(v, Tensor)]
        for output, actual, reference in zip(
            session.get_outputs(), run_session(session, feeds), expected, strict=True
        ):
            parity.compare("onnx_vs_torch", f"{case}: {output.name}", actual, reference)
    return parity


def run_session(session: onnxruntime.InferenceSession, feeds: Mapping[str, Tensor]) -> list[Tensor]:
    """Outputs of a session for tensors by input name; floats are fed in the dtype of the graph."""
    kinds = {value.name: value.type for value in session.get_inputs()}
    arrays = {
        name: (tensor.half() if kinds[name] == "tensor(float16)" else tensor).numpy()
        for name, tensor in feeds.items()
        if name in kinds
    }
    return [torch.from_numpy(value) for value in session.run(None, arrays)]


def _cases(
    session: onnxruntime.InferenceSession,
    examples: Feeds,
    choices: Sequence[tuple[int, int]] = _SIZES,
) -> dict[str, Feeds]:
    """Cases by name: the examples in other sizes.

    Only the example's sizes where the graph has no dynamic dimension.
    """
    shapes = {value.name: value.shape for value in session.get_inputs()}
    batch = next((s[0] for s in shapes.values() if s and isinstance(s[0], str)), None)
    cases: dict[str, Feeds] = {}
    for rows, length in choices:
        sizes: dict[str, int] = {}
        feeds: Feeds = {}
        for name, example in examples.items():
            shape = [
                _size(dim, example, axis, rows if dim == batch else length, sizes, batch)
                for axis, dim in enumerate(shapes[name])
            ]
            feeds[name] = _resized(example, shape)
        label = ", ".join(
            f"{name} {list(tensor.shape)}" for name, tensor in list(feeds.items())[:1]
        )
        if label in cases:
            continue
        cases[label] = feeds
        if _MASK in feeds and feeds[_MASK].dim() == 2:
            feeds[_MASK] = torch.ones_like(feeds[_MASK])
            if rows > 1:
                cases[f"{label}, padded right"] = feeds | {
                    _MASK: _padding(feeds[_MASK], left=False)
                }
                cases[f"{label}, padded left"] = feeds | {_MASK: _padding(feeds[_MASK], left=True)}
    return cases


def _size(
    dim: object, example: Tensor, axis: int, size: int, sizes: dict[str, int], batch: str | None
) -> int:
    """The size of a dimension; samples of audio are as many more, for layers that need some."""
    if not isinstance(dim, str):
        return example.shape[axis]
    more = example.shape[axis] if example.is_floating_point() and dim != batch else 0
    return sizes.setdefault(dim, more + size)


def _resized(example: Tensor, shape: Sequence[int]) -> Tensor:
    """The example with its own values repeated or cut along each dimension."""
    for axis, size in enumerate(shape):
        if example.shape[axis] != size:
            example = example.index_select(axis, torch.arange(size) % example.shape[axis])
    return example


def _ended(feeds: Feeds, model: Any) -> Feeds:
    """A case whose texts end with the end token, and whose padding is one token.

    Models that pool at the end token, or at the largest (CLIP), would pool padding else. An end
    token that the vocabulary has not, as in configurations that nobody filled in, ends nothing.
    """
    ids, mask = feeds.get("input_ids"), feeds.get(_MASK)
    end = getattr(model.config.get_text_config(), "eos_token_id", None)
    if ids is None or mask is None or ids.shape != mask.shape or not isinstance(end, int):
        return feeds
    if not 0 <= end < vocabulary_of(model):
        return feeds
    other = 1 if end == 0 else 0
    ended = ids.masked_fill((ids == end) | (mask == 0), other)
    ended[torch.arange(len(ids)), (mask * torch.arange(mask.shape[1])).argmax(1)] = end
    return feeds | {"input_ids": ended}


def _padding(mask: Tensor, *, left: bool) -> Tensor:
    padded = torch.ones_like(mask)
    for row in range(1, len(mask)):
        cut = slice(None, row) if left else slice(mask.shape[1] - 2 * row, None)
        padded[row, cut] = 0
    return padded


def _fields(output: Any, names: Sequence[str]) -> list[Tensor]:
    """The fields of a model's output by name; `hidden_states.2` is the third of a field's."""
    fields = []
    for name in names:
        first, *places = name.split(".")
        value = getattr(output, first, None)
        if value is None:
            raise VerificationError(
                f"verification failed: the graph's output {name} is none of the model's",
                expected=", ".join(output),
                found=name,
                next_step="check that the graph is an export of this base",
            )
        for place in places:
            value = value[int(place)] if place.isdigit() else value[place]
        fields.append(value.float())
    return fields


def _kept(mask: Tensor | None, actual: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Both without the positions that the mask takes out, where an output has positions."""
    if (
        mask is None
        or actual.dim() != 3
        or actual.shape[:2] != mask.shape
        or actual.shape != reference.shape
    ):
        return actual, reference
    return actual[mask.bool()], reference[mask.bool()]
