"""Runs a captured decoder in ONNX Runtime and its model in PyTorch on the same ragged texts."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from torch import Tensor, nn

from bone_fx.base.skeleton import skeleton_from_config
from bone_fx.capture.decoder.capture_decoder import DecoderCapture, capture_decoder
from bone_fx.onnx.translate import translate
from bone_fx.weights.recipes.recipe import Recipe, Value
from tests.capture.decoder.decoders import DECODERS

TEXTS = (5, 13)
STEPS = 3
FIXED = 64
"""Positions of a cache of fixed size: beyond the switches of longrope's tables among the rows."""


def skeleton_of(model: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A model of the same class and configuration without weights."""
    return skeleton_from_config(model.config, dtype, type(model))


def capture_of(
    model: Any, dtype: torch.dtype = torch.float32, *, last_token_logits: bool = False
) -> DecoderCapture:
    """Captures the model's skeleton, so that no weight can have had a part in it."""
    return capture_decoder(skeleton_of(model, dtype), last_token_logits=last_token_logits)


class Captured(NamedTuple):
    """A row's model and the capture of its skeleton."""

    model: Any
    capture: DecoderCapture


@cache
def captured(name: str) -> Captured:
    """The row of this name, captured once a process: for tests that change neither."""
    model = next(row for row in DECODERS if row.name == name).build()
    return Captured(model, capture_of(model))


def onnx_of(capture: DecoderCapture, model: nn.Module) -> ir.Model:
    """Translates a capture and binds the weights of a real model to it."""
    state = model.state_dict()
    recipes: dict[str, Recipe] = {name: Value(p.detach(), origin=name) for name, p in state.items()}
    recipes |= {name: Value(t, origin=name) for name, t in capture.constants.items()}
    for name, derived in capture.derived.items():
        assert derived.function == "add_one"
        recipes[name] = Value(state[derived.source].detach() + 1, origin=name)
    return translate(
        capture.program,
        recipes,
        input_names=capture.input_names,
        output_names=capture.output_names,
        dim_names=capture.axis_names,
    )


def session_of(model: ir.Model) -> ort.InferenceSession:
    """A session on the CPU."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    content = ir.to_proto(model).SerializeToString()
    return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])


@cache
def captured_onnx(name: str) -> ir.Model:
    """The translation of a captured row, once a process: for tests that read it."""
    model, capture = captured(name)
    return onnx_of(capture, model)


@cache
def captured_session(name: str) -> ort.InferenceSession:
    """A session of a captured row."""
    return session_of(captured_onnx(name))


class Generation:
    """A cache and a mask that grow, or with `buffer` stand at so many positions from the start.

    onnxruntime-genai feeds a graph so; the second way under CUDA graphs.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        capture: DecoderCapture,
        batch: int,
        buffer: int = 0,
    ) -> None:
        self.session, self.buffer = session, buffer
        self.outputs = capture.output_names
        self.dtype = np.float16 if capture.dtype is torch.float16 else np.float32
        self.past = {}
        for layer in capture.layers:
            for kind, size in (("key", layer.key_size), ("value", layer.value_size)):
                shape = (batch, layer.kv_heads, buffer, size)
                self.past[f"past_key_values.{layer.layer}.{kind}"] = np.zeros(shape, self.dtype)
        self.mask = np.zeros((batch, 0), np.int64)

    def __call__(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Logits of new tokens, of which `mask` says which are padding."""
        self.mask = np.concatenate([self.mask, mask.numpy()], axis=1)
        wide = np.pad(self.mask, ((0, 0), (0, max(0, self.buffer - self.mask.shape[1]))))
        feeds = {"input_ids": tokens.numpy(), "attention_mask": wide, **self.past}
        logits, *presents = self.session.run(self.outputs, feeds)
        self.past = dict(zip(self.past, presents, strict=True))
        return torch.from_numpy(np.asarray(logits)).float()


def texts(vocabulary: int, lengths: tuple[int, ...] = TEXTS) -> list[Tensor]:
    """Random texts, each long enough for the decode steps that follow."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, vocabulary, (n + STEPS,), generator=generator) for n in lengths]


def differences(
    model: Any, capture: DecoderCapture, session: ort.InferenceSession
) -> dict[str, float]:
    """Largest differences from the model run on each text alone and unpadded."""
    rows = texts(model.config.vocab_size)
    with torch.no_grad():
        expected = [model(input_ids=row[None]).logits[0].float() for row in rows]
    longest = max(TEXTS)
    tokens, mask = (
        torch.zeros(len(rows), longest, dtype=torch.long),
        torch.zeros(len(rows), longest, dtype=torch.long),
    )
    for i, (row, n) in enumerate(zip(rows, TEXTS, strict=True)):
        tokens[i, :n], mask[i, :n] = row[:n], 1
    run = Generation(session, capture, len(rows))
    prefill = run(tokens, mask)
    found = {"prefill": max(_far(prefill[i, :n], expected[i][:n]) for i, n in enumerate(TEXTS))}
    found["decode"] = 0.0
    for step in range(STEPS):
        new = torch.stack([row[n + step] for row, n in zip(rows, TEXTS, strict=True)])[:, None]
        logits = run(new, torch.ones_like(new))
        for i, n in enumerate(TEXTS):
            found["decode"] = max(found["decode"], _far(logits[i, 0], expected[i][n + step]))
    alone = Generation(session, capture, 1)
    if capture.share_buffer:
        fixed, row = Generation(session, capture, 1, FIXED), rows[1][None]
        steps = [fixed(part, torch.ones_like(part))[0] for part in row.split([13, 1, 1, 1], 1)]
        found["fixed"] = _far(torch.cat(steps), expected[1])
    row = rows[0][None]
    found["one"] = _far(alone(row[:, :4], torch.ones_like(row[:, :4]))[0], expected[0][:4])
    found["chunk"] = _far(alone(row[:, 4:], torch.ones_like(row[:, 4:]))[0], expected[0][4:])
    return found


def _far(a: Tensor, b: Tensor) -> float:
    assert torch.isfinite(a).all()
    return float((a - b).abs().max())
