"""Which bytes every parameter and buffer of a model has: the recipes of a base checkpoint."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from bone_fx.errors import AdapterError, BaseModelError, some
from bone_fx.weights.recipes.recipe import Concat, Converted, Read, Recipe, Value, cast, dtype_name


@dataclass(frozen=True)
class Source:
    """What one name of the model is made of.

    Attributes:
        keys: Names of the tensors in the checkpoint, in the order in which `convert` takes them.
        convert: From their tensors to the model's; None if it is the one tensor as it is.
        label: What `convert` does, in a few words.
        slices: The sources of each index of the first dimension, `[1, ...]`, where these are made
            one by one: experts, each of a tensor or two of its own.
    """

    keys: tuple[str, ...]
    convert: Callable[[Sequence[Tensor]], Tensor] | None = None
    label: str = ""
    slices: tuple[Source, ...] = ()


@dataclass(frozen=True)
class LoadPlan:
    """How a checkpoint's names and layouts become a model's.

    Attributes:
        sources: For each name in memory, what it is made of.
        tied: Names that have no bytes of their own if the other has: `{name: other name}`, read in
            both directions.
        unexpected: Names in the checkpoint that the model has no use for, each with the name that
            it would have in the model.
        ignored: The same for those that the model's class itself says not to mind.
        optional: Names that the model computes by itself if the checkpoint lacks them.
    """

    sources: Mapping[str, Source]
    tied: Mapping[str, str] = field(default_factory=dict)
    unexpected: Mapping[str, str] = field(default_factory=dict)
    ignored: Mapping[str, str] = field(default_factory=dict)
    optional: frozenset[str] = frozenset()

    def source_name(self, name: str) -> str | None:
        """The name that a name's bytes are listed under: itself, or one that it is tied to."""
        if name in self.sources:
            return name
        root = self.tied.get(name, name)
        aliases = [root, *(target for target, source in self.tied.items() if source == root)]
        return next((alias for alias in aliases if alias in self.sources), None)


def recipes_for(
    model: nn.Module,
    plan: LoadPlan,
    stored: Mapping[str, Read],
    *,
    extra: Mapping[str, Tensor] | None = None,
) -> dict[str, Recipe]:
    """A recipe for every parameter and buffer of a model, under its name in memory.

    Args:
        model: A model, as a rule a skeleton; its tensors give the shapes and dtypes.
        plan: How the checkpoint's names become the model's.
        stored: Every tensor of the checkpoint under its name on disk.
        extra: Parameters that come from elsewhere (`modules_to_save` of an adapter) and go before
            the base's.

    Returns:
        The recipes. Names that share one tensor in the model, tied weights, share one recipe
        object.

    Raises:
        BaseModelError: A parameter found no bytes, or bytes of another shape.
        AdapterError: `extra` holds a name or shape that the model does not have.
    """
    extra = extra or {}
    tensors = dict(_named_tensors(model))
    _check_extra(extra, tensors)
    by_tensor: dict[int, Recipe] = {}
    recipes: dict[str, Recipe] = {}
    missing: list[str] = []
    for name, tensor in tensors.items():
        if name in extra:
            recipes[name] = by_tensor.setdefault(
                id(tensor), cast(Value(extra[name], "adapter's"), tensor.dtype)
            )
            continue
        if id(tensor) in by_tensor:
            recipes[name] = by_tensor[id(tensor)]
            continue
        source = plan.source_name(name)
        if source is not None:
            recipe: Recipe = _recipe(name, tensor, plan.sources[source], stored)
        elif (
            not isinstance(tensor, FakeTensor)
            and not tensor.is_meta
            and _is_computed(model, name, plan)
        ):
            recipe = Value(tensor.detach(), "computed")
        else:
            missing.append(name)
            continue
        recipes[name] = by_tensor[id(tensor)] = recipe
    if missing:
        raise _no_bytes(missing, stored)
    return recipes


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _is_computed(model: nn.Module, name: str, plan: LoadPlan) -> bool:
    """Whether the model's own code gives the value, which no checkpoint needs to hold.

    Buffers that are not saved, and counts and indices that are; of the rest what the class says.
    """
    path, _, attribute = name.rpartition(".")
    owner = model.get_submodule(path)
    buffer = owner._buffers.get(attribute)
    if buffer is None or name in plan.optional:
        return name in plan.optional
    return attribute in owner._non_persistent_buffers_set or not buffer.is_floating_point()


def _recipe(name: str, tensor: Tensor, source: Source, stored: Mapping[str, Read]) -> Recipe:
    # A recipe object stands for one tensor of the model: an untied alias reads the same bytes
    # through its own.
    reads = tuple(replace(stored[key]) for key in source.keys)
    recipe: Recipe = reads[0]
    odd = next((read for read in reads if _is_no_float(read, tensor)), None)
    if odd is not None:
        raise BaseModelError(
            f"{name} is stored as {dtype_name(odd.dtype)}: these are no weights as they stand",
            expected="weights in float32, float16, bfloat16 or float64",
            found=odd.describe(),
            next_step="use the unquantized model, or dequantize it first",
        )
    if source.convert is not None:
        # Shards of one constant may have been stored in different dtypes; a conversion joins
        # equals.
        alike = (
            tuple(cast(read, tensor.dtype) for read in reads)
            if len({r.dtype for r in reads}) > 1
            else reads
        )
        recipe = _converted(source, dict(zip(source.keys, alike, strict=True)), tuple(tensor.shape))
    if recipe.shape != tuple(tensor.shape):
        raise BaseModelError(
            f"{name} has another shape in the checkpoint than config.json says",
            expected=list(tensor.shape),
            found=f"{list(recipe.shape)} in {recipe.describe()}",
            next_step="use the config.json that belongs to these weights",
        )
    return cast(recipe, tensor.dtype)


def _converted(source: Source, stored: Mapping[str, Recipe], shape: tuple[int, ...]) -> Recipe:
    """The recipe of a conversion; what is made index by index costs no more than what is asked."""

    def converted(source: Source, shape: tuple[int, ...]) -> Recipe:
        assert source.convert is not None
        read = tuple(stored[key] for key in source.keys)
        return Converted(read, source.convert, shape, source.label)

    if len(source.slices) != shape[0]:
        return converted(source, shape)
    return Concat(tuple(converted(each, (1, *shape[1:])) for each in source.slices))


def _is_no_float(read: Read, tensor: Tensor) -> bool:
    """Whether a tensor of floats is stored as something else: codes, flags or complex numbers."""
    return tensor.is_floating_point() and not read.dtype.is_floating_point


def _check_extra(extra: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    for name, value in extra.items():
        if name not in tensors:
            raise AdapterError(
                f"the adapter saved {name}, which the base model does not have",
                expected=f"a name such as {_nearest(name, tensors)}",
                found=name,
                next_step="use the base model that the adapter was trained on, or "
                f"--allow-unused '{name}' if the adapter is right without it",
            )
        if tensors[name].is_floating_point() and not value.is_floating_point():
            raise AdapterError(
                f"the adapter's {name} holds no floats",
                expected=dtype_name(tensors[name].dtype),
                found=dtype_name(value.dtype),
                next_step="save the adapter again with PEFT's save_pretrained",
            )
        if value.shape != tensors[name].shape:
            raise AdapterError(
                f"the adapter's {name} does not fit the base model",
                expected=list(tensors[name].shape),
                found=list(value.shape),
                next_step="use the base model that the adapter was trained on",
            )
        partners = [n for n, t in tensors.items() if t is tensors[name] and n not in extra]
        if partners:
            raise AdapterError(
                f"the adapter saved {name}, which the base model ties to {', '.join(partners)}",
                expected="a weight of its own",
                next_step="untie it in the base model",
            )


def _no_bytes(missing: Sequence[str], stored: Mapping[str, Read]) -> BaseModelError:
    shown = some([f"{name} (nearest: {_nearest(name, stored)})" for name in missing], 5, "; ")
    return BaseModelError(
        f"{len(missing)} parameter(s) of the model are not in the checkpoint: {missing[0]}",
        expected=f"bytes for {shown}",
        found=f"{len(stored)} tensors",
        next_step="use the complete checkpoint, or an adapter that saved these (modules_to_save): "
        "nothing is initialised at random",
    )


def _nearest(name: str, names: Mapping[str, object]) -> str:
    return ", ".join(difflib.get_close_matches(name, names, n=2, cutoff=0.3)) or "none"
