"""What a model's linear layers and its cache see on a text, without holding its weights.

A skeleton runs the text once. Each module that owns parameters gets them, folded and in float32,
as it is called, and gives them back as it returns: one module's weights are there at a time, of an
embedding only the rows that are read. The run ends where the logits would be computed.

Shape letters: B texts, K key/value heads (in a linear layer its inputs), T tokens, D head size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AutoTokenizer, DynamicCache
from transformers.pytorch_utils import Conv1D

from bone_fx.base.architectures import reference_attention
from bone_fx.base.loading import BaseCheckpoint, skeleton
from bone_fx.base.tokenizer import cannot_be_read
from bone_fx.weights.recipes.quantized import rows_in_float32
from bone_fx.weights.recipes.recipe import Recipe
from bone_fx.weights.recipes.second_moments import InputSums, SecondMoments

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BUILT_IN = Path(__file__).with_suffix(".txt")
WINDOW, WINDOWS = 256, 4
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_UP, _DOWN, _GATE = "gate_up_proj", "down_proj", "_apply_gate"
"""What transformers calls the weights of all experts, and what stands between their products."""
_RUN_ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError)


Largest = Mapping[int, tuple[Tensor, Tensor]]
"""Of keys and of values, by layer."""


class CalibrationError(Exception):
    """The model cannot be run on the text; the message says why."""


class Text(NamedTuple):
    """A text to run.

    Attributes:
        name: Its file's name, or `built-in`.
        content: The text.
    """

    name: str
    content: str

    @property
    def sha256(self) -> str:
        """Of the text in UTF-8."""
        return hashlib.sha256(self.content.encode()).hexdigest()


@dataclass(frozen=True)
class Moments:
    """What a run measured.

    Attributes:
        tokens: How many tokens were run.
        of_inputs: Second moments of the K inputs by the name of the linear layer's weight; layers
            that read one tensor share them.
        of_cache: Largest key and largest value of each channel, float32 `[K, D]`, by layer.
    """

    tokens: int
    of_inputs: Mapping[str, SecondMoments]
    of_cache: Largest = field(default_factory=dict)


class _HeadReached(Exception):  # noqa: N818 - no error: the logits are of no use
    pass


def built_in_text() -> Text:
    """Prose, a dialogue, lists, numbers and code that come with bone_fx."""
    return Text("built-in", BUILT_IN.read_text(encoding="utf-8"))


def measure_inputs(
    base: BaseCheckpoint,
    architecture: type[PreTrainedModel],
    overrides: Mapping[str, Any],
    recipes: Mapping[str, Recipe],
    text: Text,
    tokenizer: Path,
) -> Moments:
    """Run a decoder on the first windows of a text.

    Args:
        base: The base model.
        architecture: The model's class.
        overrides: Fields of the configuration to set.
        recipes: The folded weights by parameter name.
        text: The text.
        tokenizer: The folder with the tokenizer that reads it.

    Raises:
        CalibrationError: There is no tokenizer, or the model does not run piece by piece.
        FoldError: A folded weight is not finite.
    """
    ids = _windows(base, token_ids(base, text, tokenizer))
    return run_in_pieces(_model(base, architecture, overrides), recipes, ids)


def measure_cache(
    base: BaseCheckpoint,
    architecture: type[PreTrainedModel],
    overrides: Mapping[str, Any],
    recipes: Mapping[str, Recipe],
    ids: Tensor | None,
    partners: Sequence[Tensor | None],
) -> tuple[Largest, int]:
    """Run a decoder on the first windows of a text, and measure its keys and values.

    Random tokens would show more, but what single ones of them do is out of all proportion to a
    text: its scales would be coarse.

    Args:
        base: The base model.
        architecture: The model's class.
        overrides: Fields of the configuration to set.
        recipes: The folded weights by parameter name.
        ids: Token ids `[T]` of a text; None for random ones.
        partners: For each layer the channel `[D]` that each channel of a key is turned with by its
            position; None for a layer whose keys are not turned.

    Returns:
        Largest key and largest value of each channel, float32 `[K, D]`, by layer; and how many
        tokens were run.

    Raises:
        CalibrationError: The model does not run piece by piece.
        FoldError: A folded weight is not finite.
    """
    vocabulary = int(getattr(base.config.get_text_config(), "vocab_size", None) or 2)
    generator = torch.Generator().manual_seed(0)
    few = torch.randint(0, vocabulary, (WINDOW * WINDOWS,), generator=generator)
    rows = _windows(base, few if ids is None else ids)
    model = _model(base, architecture, overrides)
    found = run_in_pieces(model, recipes, rows, partners).of_cache
    return found, rows.numel()


def _model(
    base: BaseCheckpoint, architecture: type[PreTrainedModel], overrides: Mapping[str, Any]
) -> PreTrainedModel:
    model, _ = skeleton(
        base,
        torch.float32,
        architecture=architecture,
        config_overrides=overrides,
        attn_implementation=reference_attention(base.config),
    )
    return model


def run_in_pieces(
    model: PreTrainedModel,
    recipes: Mapping[str, Recipe],
    ids_BT: Tensor,
    partners: Sequence[Tensor | None] | None = None,
) -> Moments:
    """Run a skeleton on token ids, each module with its weights only while it is called.

    Raises:
        CalibrationError: A weight is used outside of the module that owns it, or the model refuses
            the ids.
    """
    run = _Run(model, recipes, sums_up=partners is None)
    cache = None if partners is None else _MeasuredCache(model.config, partners)
    with ExitStack() as stack:
        for name, module in model.named_modules():
            run.attach(name, module, stack)
        try:
            with torch.no_grad():
                cast(nn.Module, model)(
                    input_ids=ids_BT, past_key_values=cache, use_cache=cache is not None
                )
        except _HeadReached:
            pass
        except _RUN_ERRORS as error:
            raise CalibrationError(
                f"the model does not run piece by piece ({type(error).__name__}: "
                f"{' '.join(str(error).split())[:200]})"
            ) from error
    shared = {id(sums): sums.moments() for sums in run.sums.values()}
    found = {name: shared[id(sums)] for name, sums in run.sums.items()}
    finite = {name: each for name, each in found.items() if each.is_finite()}
    return Moments(ids_BT.numel(), finite, {} if cache is None else cache.largest)


class _MeasuredCache(DynamicCache):
    """Measures what it is given, and keeps nothing: a text is run at once."""

    def __init__(self, config: Any, partners: Sequence[Tensor | None]) -> None:
        super().__init__(config=config)
        self._partners = partners
        self.largest: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Notes the largest of each channel; keys and values are `[B, K, T, D]`."""
        if isinstance(key_states, FakeTensor) or isinstance(value_states, FakeTensor):
            raise CalibrationError(f"the keys of layer {layer_idx} are not computed")
        key, partners = key_states, self._partners[layer_idx]
        if partners is not None:
            turned = partners != torch.arange(len(partners))
            key = torch.where(turned, torch.hypot(key, key[..., partners]), key)
        self.largest[layer_idx] = (_largest(key), _largest(value_states))
        return key_states, value_states


def _largest(x_BKTD: Tensor) -> Tensor:
    return x_BKTD.detach().abs().amax((0, 2)).float()


class _Run:
    """The hooks of one run, and what they summed up of the inputs, if they did."""

    def __init__(
        self, model: PreTrainedModel, recipes: Mapping[str, Recipe], *, sums_up: bool
    ) -> None:
        self.recipes = recipes
        self.sums_up = sums_up
        self.table: Any = model.get_input_embeddings()
        self.head: Any = cast(Any, model).get_output_embeddings()
        self.sums: dict[str, InputSums] = {}
        self._last: tuple[Tensor, InputSums] | None = None

    def attach(self, name: str, module: nn.Module, stack: ExitStack) -> None:
        """Hook a module if it owns tensors that are not there; the stack takes the hooks out."""
        held: list[tuple[dict[str, Any], str, Tensor, Recipe]] = [
            (cast(dict[str, Any], tensors), key, tensor, self.recipes[full])
            for tensors in (module._parameters, module._buffers)
            for key, tensor in tensors.items()
            if isinstance(tensor, FakeTensor)
            and (full := f"{name}.{key}".removeprefix(".")) in self.recipes
        ]
        if not held:
            return
        linear = isinstance(module, nn.Linear | Conv1D)
        weight_name = f"{name}.weight"
        experts = f"{name}.{_UP}" in self.recipes and hasattr(module, _GATE)
        if experts:
            self._follow_gate(name, module, stack)

        def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
            if linear:
                self._record(weight_name, args[0])
            if experts:
                self._record(f"{name}.{_UP}", args[0])
            if module is self.head:
                raise _HeadReached
            by_rows = module is self.table or type(module) is nn.Embedding
            for tensors, key, tensor, recipe in held:
                value = _rows(recipe, args[0]) if by_rows and args else _whole(recipe)
                # A module tells parameters from buffers by where they lie, not by their class.
                tensors[key] = (
                    nn.Parameter(value, requires_grad=False)
                    if isinstance(tensor, nn.Parameter)
                    else value
                )

        def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
            for tensors, key, tensor, _ in held:
                tensors[key] = tensor

        stack.callback(module.register_forward_pre_hook(enter).remove)
        stack.callback(module.register_forward_hook(leave).remove)

    def _follow_gate(self, name: str, module: nn.Module, stack: ExitStack) -> None:
        """Record what leaves a mixture's gate: what its experts' second products read."""
        gate = getattr(module, _GATE)

        def followed(x: Tensor) -> Tensor:
            gated: Tensor = gate(x)
            self._record(f"{name}.{_DOWN}", gated)
            return gated

        setattr(module, _GATE, followed)
        stack.callback(delattr, module, _GATE)

    def _record(self, name: str, x: Tensor) -> None:
        if isinstance(x, FakeTensor):
            # A fake weight makes everything after it fake without a word.
            raise CalibrationError(
                f"the input of {name} is not computed: a weight before it is not there"
            )
        if not self.sums_up:
            return
        if self._last is not None and x is self._last[0] and name not in self.sums:
            self.sums[name] = self._last[1]
            return
        sums = self.sums.setdefault(name, InputSums(x.shape[-1]))
        sums.add(x.detach().flatten(0, -2))
        self._last = x, sums


def _whole(recipe: Recipe) -> Tensor:
    if not recipe.dtype.is_floating_point:
        return recipe.evaluate()
    return rows_in_float32(recipe, transposed=False).evaluate()


def _rows(recipe: Recipe, ids: Tensor) -> Tensor:
    """A table of which only the rows that are read are there: the rest is never written."""
    exact = rows_in_float32(recipe, transposed=False)
    table = torch.empty(exact.shape)
    for row in sorted(set(ids.flatten().tolist())):
        exact.fill(table[row : row + 1], ((row, row + 1), (0, exact.shape[1])))
    return table


def token_ids(base: BaseCheckpoint, text: Text, folder: Path) -> Tensor:
    """Token ids `[T]` of a text by the tokenizer in a folder.

    Raises:
        CalibrationError: There is no tokenizer, or its ids are not the model's.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise CalibrationError("the base has no tokenizer")
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            folder,
            config=base.config,
            local_files_only=True,
            trust_remote_code=base.trust_remote_code,
        )
        ids = torch.tensor(tokenizer(text.content, verbose=False)["input_ids"])
    except BaseException as error:
        if not cannot_be_read(error):
            raise
        raise CalibrationError(
            f"the base's tokenizer cannot be read ({type(error).__name__})"
        ) from error
    vocabulary = getattr(base.config.get_text_config(), "vocab_size", None)
    if len(ids) < 2 or (vocabulary is not None and int(ids.max()) >= int(vocabulary)):
        raise CalibrationError("the tokenizer's ids are not the model's")
    return ids


def _windows(base: BaseCheckpoint, ids: Tensor) -> Tensor:
    """Token ids `[B, T]`: as many whole windows as there are, or the one that is not whole."""
    most = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    length = min(WINDOW, int(most or WINDOW), len(ids))
    count = min(WINDOWS, len(ids) // length)
    return ids[: count * length].view(count, length)
