"""Verification of a decoder graph.

The reference runs every row unpadded and without a cache, so that padding, masks, positions and
the cache of the graph are all on trial. Long texts are met on the first layers alone
(`verify.decoder.long_texts`).

Shape letters: B batch, S new tokens, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import nn

from bone_fx.verify.cases import decoder_cases, rows_of
from bone_fx.verify.compare_quantized import ROUNDED_ACTIVATIONS, Written
from bone_fx.verify.decoder.cache_scales import check_scales
from bone_fx.verify.decoder.long_texts import verify_long_texts
from bone_fx.verify.decoder.quantized_cache import FP8, QuantizedCache
from bone_fx.verify.decoder.routes import Routes
from bone_fx.verify.decoder.running import Generation, routed
from bone_fx.verify.decoder.runs import Run, Runs
from bone_fx.verify.decoder.samples import graph_likelihood, torch_likelihood
from bone_fx.verify.graph import Edit, WrittenGraph, keep_activations
from bone_fx.verify.parity import (
    FP8_CACHE_IN_FP16,
    INT8_CACHE,
    SMALLEST,
    TOLERANCE,
    Parity,
    check_effect,
)
from bone_fx.verify.ranges import LARGEST, within_range
from bone_fx.verify.reference import Adapters, fold_in_place, load_parameters, unmerged

_GREEDY_TOKENS = 8


@dataclass(frozen=True)
class DecoderChecks:
    """How a decoder is verified.

    Attributes:
        dtype: `"fp32"` or `"fp16"`, which sets the tolerance.
        vocab_size: V, the range of random token ids.
        context_length: Positions that the graph holds for; cases beyond it are left out.
        short: Run the short cases only, and no long text.
        text: Token ids of a real text, which stand in the place of random ones.
        samples: Token ids of texts of the user's, whose likelihood is a figure.
    """

    dtype: str
    vocab_size: int
    context_length: int | None = None
    short: bool = False
    text: tuple[int, ...] = ()
    samples: tuple[tuple[int, ...], ...] = ()


def verify_decoder(
    graph: WrittenGraph,
    model: nn.Module,
    adapters: Adapters,
    checks: DecoderChecks,
    written: Written | None = None,
) -> Parity:
    """Compare a graph with the base model under its adapters.

    Args:
        graph: The exported graph; inputs and outputs named as onnxruntime-genai names them.
        model: The base model in float32 and eval mode; it is folded in place and must not be used
            afterwards.
        adapters: The adapters as verification read them, in the order in which they apply.
        checks: What is run.
        written: The graph's quantized weights; the graph is then held to torch with these.

    Raises:
        VerificationError: Two of the three disagree, or a value is not finite.
    """
    tolerance = TOLERANCE[checks.dtype]
    cache = QuantizedCache.of(graph.path, tolerance)
    if cache is not None and graph.provider != "cpu":
        # CUDA's kernels read the keys of a prompt before they are rounded, the CPU's after that.
        tolerance, cache = INT8_CACHE, replace(cache, tolerance=INT8_CACHE)
    if cache is not None and cache.numbers is FP8 and checks.dtype == "fp16":
        tolerance = FP8_CACHE_IN_FP16
    parity = Parity(tolerance, SMALLEST[checks.dtype])
    cases = decoder_cases(model.config, checks.context_length, short=checks.short)
    rows = [
        rows_of(case, checks.vocab_size, seed, checks.text if seed else ())
        for seed, case in enumerate(cases)
    ]
    costs = tolerance if cache is None else cache.numbers.cost
    runs = Runs(parity, cases, rows, graph, model, cache, 0 if checks.short else _GREEDY_TOKENS)
    actual: list[Run] = []
    if written is None:
        actual, generated = runs.run(())
        parity.generated = generated
    # What quantization costs is measured against a model that chooses experts by itself.
    free: list[list[Routes]] = [[[] for _ in r] for r in rows]
    routes = [run.routes for run in actual] if written is None else free
    base = runs.expect(routes[:2], math.inf)[0] if adapters else []
    if checks.samples and adapters:
        parity.figures["nll_base"] = torch_likelihood(model, checks.samples)
    load_parameters(model, adapters)
    with unmerged(model, adapters), within_range(model, checks.dtype):
        if cache is not None:
            check_scales(model, cache, checks.text or max((r for c in rows for r in c), key=len))
        reference, routes = runs.expect(routes, costs)
        rounded = runs.rounded(actual, routes, tolerance) if cache and actual else reference
        if checks.text and checks.dtype in LARGEST:
            torch_likelihood(model, (checks.text,))  # for its activations, the first token's too
        if checks.samples:
            name = "nll_adapter" if adapters else "nll_base"
            parity.figures[name] = torch_likelihood(model, checks.samples)
    fold_in_place(model, adapters)
    folded = runs.expect(routes, costs)[0] if adapters else reference
    for case, ones, others in zip(cases, folded, reference, strict=True):
        for row, (one, other) in enumerate(zip(ones, others, strict=True)):
            where = f"{case.name}, row {row}"
            parity.compare("unmerged_vs_folded", where, one, other, TOLERANCE["fp32"])
    references = {"onnx_vs_unmerged": rounded, "onnx_vs_folded": folded}
    edits: tuple[Edit, ...] = ()
    if written is None:
        if cache and adapters:
            references["onnx_vs_folded"] = runs.rounded(actual, routes, tolerance)
        elif cache:
            references["onnx_vs_folded"] = rounded
        runs.compare(actual, references, tolerance)
        if cache:
            runs.compare(actual, {cache.numbers.figure: folded}, cache.numbers.cost)
    else:
        written.load_into(model)
        rounds = graph.rounds_activations()
        edits = (keep_activations,) if rounds else ()
        actual, generated = runs.run(edits)
        chosen = [run.routes for run in actual]
        quantized = (
            runs.rounded(actual, chosen, tolerance, edits)
            if cache
            else runs.expect(chosen, tolerance, edits)[0]
        )
        published, parity.generated = runs.run(()) if rounds else (actual, generated)
        if rounds:
            # Rounded activations send tokens to other experts; their choice was tried unrounded.
            routes = [run.routes for run in published]
            led = runs.expect(routes, math.inf)[0] if any(map(any, routes)) else quantized
            runs.compare(published, {"rounded_activations": led}, ROUNDED_ACTIVATIONS)
        runs.compare(actual, {"onnx_vs_written": quantized}, tolerance, edits)
        if cache:
            # Coarse weights leave random tokens near where activations become massive, or do not:
            # as with rounded activations, the comparison above is the one that binds.
            floats = runs.expect(chosen, math.inf, edits)[0]
            runs.compare(actual, {cache.numbers.figure: floats}, ROUNDED_ACTIVATIONS, edits)
        runs.compare(published, references, math.inf)
    if not checks.short:
        verify_long_texts(parity, graph, edits, model, checks.context_length, cache)
    if generated is not None:
        _compare_greedy(parity, model, generated)
    likelihood = graph_likelihood(graph.session(), checks.samples) if checks.samples else None
    if likelihood is not None:
        parity.figures["nll_export"] = likelihood
    effects = [
        (a, b)
        for one, other in zip(base, reference, strict=False)
        for a, b in zip(one, other, strict=True)
    ]
    check_effect(parity, effects)
    return parity


def _compare_greedy(parity: Parity, model: nn.Module, generated: Generation) -> None:
    """Each token that a graph generated must be the reference's best, or as good."""
    case = f"{len(generated.tokens)} tokens, greedily"
    ids = [*generated.prompt, *generated.tokens[:-1]]
    given = (generated.routes, parity.tolerance, case, generated.kept)
    scored = routed(model, ids, *given)[0][len(generated.prompt) - 1 :]
    logits = scored.gather(1, torch.tensor(generated.tokens)[:, None])[:, 0]
    parity.compare("greedy_tokens", case, logits, scored.amax(1), parity.tolerance)
