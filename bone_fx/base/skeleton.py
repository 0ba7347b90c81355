"""Models without weights: parameters are fake, buffers that no checkpoint holds are real.

The model's own constructor runs on the CPU, and each parameter becomes a meta tensor as soon as it
is registered, so one parameter at a time exists and none is ever written to. Buffers are computed
by the model's own code as they always are. Last, parameters become FakeTensors on the CPU:
`torch.onnx.ops.symbolic` does not work on meta tensors.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.core_model_loading import build_glob_alternation

from bone_fx.errors import BaseModelError
from bone_fx.weights.load_plan import LoadPlan

SameBytes = Callable[[LoadPlan, str, str], bool]
_BUILD_ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    AssertionError,
    ImportError,
    MemoryError,
)


def skeleton_from_config(
    config: PreTrainedConfig, dtype: torch.dtype, architecture: type[PreTrainedModel]
) -> PreTrainedModel:
    """A skeleton whose checkpoint would hold everything that the model saves."""
    model = meta_model(config, dtype, architecture)
    complete(model, dtype)
    return model


def meta_model(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    architecture: type[PreTrainedModel],
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """A model whose parameters are meta tensors, none tied yet, and whose buffers are real.

    Args:
        config: The model's configuration; it is copied.
        dtype: Floating dtype of the parameters.
        architecture: The model's class.
        attn_implementation: Name of the attention function, if not the default.

    Raises:
        BaseModelError: The class cannot be built from the configuration.
    """
    config = copy.deepcopy(config)
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    try:
        # The model initializes outside the constructor, as when it is loaded: inside, the default
        # dtype may be a half one, and what buffers are computed from would be rounded to it.
        with init.no_init_weights(), init.no_tie_weights(), _parameters_on_meta():
            build = cast(Callable[..., PreTrainedModel], architecture._from_config)
            model = build(config, dtype=dtype, **options)
        model.initialize_weights()  # type: ignore[no-untyped-call]
    except _BUILD_ERRORS as error:
        raise BaseModelError(
            f"{architecture.__name__} cannot be built from config.json",
            found=f"{type(error).__name__}: {error}",
            next_step="use the config.json that belongs to this model",
        ) from error
    return model


def complete(
    model: PreTrainedModel,
    dtype: torch.dtype,
    plan: LoadPlan | None = None,
    same_bytes: SameBytes | None = None,
    untie: Collection[str] = (),
) -> None:
    """Make a meta model a skeleton in eval mode, in place: its parameters become fake.

    Args:
        model: From `meta_model`.
        dtype: Floating dtype of the parameters; modules that the model keeps in float32 stay so.
        plan: What the checkpoint holds; without one, everything that is saved counts as there.
        same_bytes: Whether two names have the same bytes in the checkpoint, for tied weights that
            are both there.
        untie: Parameters that get a tensor of their own though the model ties them.
    """
    saved = model.state_dict()
    in_checkpoint = {name for name in saved if plan is None or plan.source_name(name) is not None}
    if plan is not None:
        _compute_optional(model, plan)
    _keep_in_float32(model, dtype, in_checkpoint)
    _tie(model, plan, same_bytes, untie)
    _make_fake(model, in_checkpoint)
    nn.Module.eval(model)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters that this thread registers lose their data and count as initialized."""
    builder = threading.get_ident()

    def to_meta(
        _module: nn.Module, _name: str, parameter: nn.Parameter | None
    ) -> nn.Parameter | None:
        if parameter is None or threading.get_ident() != builder or parameter.is_meta:
            return parameter
        return _meta(parameter)

    # The annotation forgets that a hook may give back another parameter, as its docstring says.
    handle = register_module_parameter_registration_hook(cast(Callable[..., None], to_meta))
    try:
        yield
    finally:
        handle.remove()


def _meta(tensor: Tensor, dtype: torch.dtype | None = None) -> nn.Parameter:
    shell = torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device="meta")
    parameter = nn.Parameter(shell, requires_grad=False)
    # transformers' own mark: do not initialize
    parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    return parameter


def _keep_in_float32(model: PreTrainedModel, dtype: torch.dtype, loaded: Collection[str]) -> None:
    """Give what transformers loads in float32, whatever the dtype asked for, that dtype."""
    patterns = model._get_dtype_plan(dtype)
    if not patterns:
        return
    search, group_pattern, _ = build_glob_alternation(list(patterns))
    for name, tensor in model.state_dict(keep_vars=True).items():
        match = search.search(name)
        if match is None or match.lastgroup is None or name not in loaded:
            continue
        float_dtype = patterns[group_pattern[match.lastgroup]]
        owner, _, attribute = name.rpartition(".")
        is_parameter = isinstance(tensor, nn.Parameter)
        value = _meta(tensor, float_dtype) if is_parameter else tensor.to(float_dtype)
        setattr(model.get_submodule(owner), attribute, value)


def _compute_optional(model: PreTrainedModel, plan: LoadPlan) -> None:
    """Let the model's own code compute the parameters that a checkpoint need not hold.

    What comes out otherwise the second time is random and stays without bytes.
    """
    names = [name for name, _ in model.named_parameters() if name in plan.optional]
    if not names:
        return
    first, second = (_initialized(model, names, seed) for seed in (0, 1))
    for name in names:
        path, _, attribute = name.rpartition(".")
        if not torch.equal(first[name], second[name]):  # so is NaN, which nothing was written to
            setattr(model.get_submodule(path), attribute, _meta(first[name]))


def _initialized(model: PreTrainedModel, names: Collection[str], seed: int) -> dict[str, Tensor]:
    """What the model's code makes of parameters, which then hold it."""
    for name in names:
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        shape, dtype = getattr(module, attribute).shape, getattr(module, attribute).dtype
        empty = nn.Parameter(torch.full(shape, torch.nan, dtype=dtype), requires_grad=False)
        setattr(module, attribute, empty)
        module._is_hf_initialized = False  # type: ignore[assignment]  # transformers' own mark
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.initialize_weights()  # type: ignore[no-untyped-call]
    return {name: model.get_parameter(name).detach().clone() for name in names}


def _tie(
    model: PreTrainedModel,
    plan: LoadPlan | None,
    same_bytes: SameBytes | None,
    untie: Collection[str],
) -> None:
    """Tie as transformers does after loading: not if both weights are there and differ."""
    for name in untie:
        model.all_tied_weights_keys.pop(name, None)
    if plan is None:
        model.tie_weights(recompute_mapping=False)
        return
    missing = {name for name in model.state_dict() if name not in plan.sources}
    for target, source in list(model.all_tied_weights_keys.items()):
        if target in missing or source in missing:
            continue
        if same_bytes is not None and same_bytes(plan, target, source):
            missing.add(target)
        else:
            model.all_tied_weights_keys.pop(target)
    if any(
        target in missing and source in missing
        for target, source in model.all_tied_weights_keys.items()
    ):
        missing = (
            set()
        )  # nothing to choose from: tie by the mapping; whoever asks for the bytes will be told
    model.tie_weights(missing_keys=missing or None, recompute_mapping=False)


def _make_fake(model: nn.Module, in_checkpoint: Collection[str]) -> None:
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    fakes: dict[Tensor, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if tensor not in fakes:
            with mode:
                shell = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            fakes[tensor] = (
                nn.Parameter(shell, requires_grad=False)
                if isinstance(tensor, nn.Parameter)
                else shell
            )
        return fakes[tensor]

    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                module._parameters[name] = cast(nn.Parameter, fake(parameter))
        for name, buffer in module._buffers.items():
            if buffer is not None and f"{prefix}.{name}".removeprefix(".") in in_checkpoint:
                module._buffers[name] = fake(buffer)
