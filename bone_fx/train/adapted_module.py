"""`AdaptedModule`: a traced model under any number of block adapters, with PEFT's verbs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from bone_fx.adapter_folder import TrainedFolder, read_trained
from bone_fx.base.hub import adapter_folder
from bone_fx.config import BoneConfig
from bone_fx.errors import UsageError
from bone_fx.progress import Progress
from bone_fx.sites import Refusal
from bone_fx.train.mounting import refuse_taken_name
from bone_fx.train.options import hub_options
from bone_fx.train.origin import capture_origin, check_model
from bone_fx.train.verbs.generating import Generating
from bone_fx.train.verbs.passing import Passing
from bone_fx.train.verbs.peft_verbs import PeftVerbs
from bone_fx.train.verbs.saving import Saving
from bone_fx.train.verbs.shown import Shown
from bone_fx.train.verbs.status import Status


class LoadResult(NamedTuple):
    """What PEFT gives back of a load: here a folder fits as a whole, or is refused."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class AdaptedModule(Shown, Generating, Saving, Status, PeftVerbs, Passing):
    """A GraphModule with one block-adaptation node a site, called like its model.

    Attributes:
        config: The base model's own configuration, if it has one.
        active_adapters: Names of the adapters in the graph, in the order in which they apply.
        refused: Targets of the adapters that could not be adapted.

    Examples:
        >>> import bone_fx, torch
        >>> net = nn.Sequential(nn.Linear(48, 80), nn.ReLU(), nn.Linear(80, 7))
        >>> x = torch.randn(3, 48)
        >>> adapted = bone_fx.adapt(net, BoneConfig(r=16, target_modules=["0"]), [x])
        >>> with adapted.disable_adapter():
        ...     torch.equal(adapted(x), net(x))
        True
        >>> adapted.add_adapter("second", BoneConfig(r=8, target_modules=["2"]))
        >>> adapted.set_adapter(["default", "second"], train="second")
        >>> type(adapted.merge_and_unload()).__name__  # the model's class, folded weights
        'Sequential'
    """

    @property
    def peft_config(self) -> dict[str, BoneConfig]:
        """Configuration of every adapter, by name."""
        return {name: adapter.config for name, adapter in self._adapters.items()}

    @property
    def refused(self) -> tuple[Refusal, ...]:
        """What was asked for by the adapters and could not be done."""
        return tuple(refusal for adapter in self._adapters.values() for refusal in adapter.refused)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: BoneConfig | Any | None = None,
        autocast_adapter_dtype: bool = True,
        *,
        example_inputs: Mapping[str, Any] | Sequence[Any] | None = None,
        progress: Progress | bool = True,
        **options: Any,
    ) -> AdaptedModule:
        """A model under a trained adapter, frozen and in evaluation mode as PEFT loads it.

        Args:
            model: The base model; it is left as it was.
            model_id: The adapter's folder, or a hub id.
            adapter_name: The adapter's name.
            is_trainable: Whether it trains; then the module has the mode of the model.
            config: Instead of the configuration in the folder; PEFT's own is taken too.
            autocast_adapter_dtype: False keeps the blocks in the dtype of their layers.
            example_inputs: One call's arguments; None makes those of a transformers model up.
            progress: As `adapt` takes it.
            **options: `subfolder`, `revision`, `token` and `cache_dir` for the hub, and PEFT's
                options of loading.

        Raises:
            AdapterError: The folder is broken, missing, or does not fit this model.
            CaptureError: The model cannot be captured.
            UsageError: An option that has no meaning here.

        Example:
            >>> adapted = bone_fx.AdaptedModule.from_pretrained(model, "out")  # doctest: +SKIP

            Skipped as a doctest: it needs a folder; the tests load them.
        """
        check_model(model)
        folder = read_trained(adapter_folder(model_id, **hub_options(options)), adapter_name)
        if config is not None:
            folder = replace(folder, config=BoneConfig.of(config))
        own = replace(folder.config, inference_mode=not is_trainable)
        origin = capture_origin(model, example_inputs, progress=progress)
        origin.progress.stage("insert the adapter")
        adapted = AdaptedModule(origin)._start(adapter_name, own, folder)
        if not autocast_adapter_dtype:
            adapted._narrow(adapter_name)
        return adapted.train(model.training and is_trainable)

    # Adapters: add, load, choose, switch off, delete.

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: BoneConfig | Any,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add an adapter with fresh blocks; `set_adapter` makes it active.

        Args:
            adapter_name: Its name.
            peft_config: A `BoneConfig`, or PEFT's own `BoneConfig` or `MissConfig`.
            low_cpu_mem_usage: Taken as PEFT takes it; blocks are small.
            autocast_adapter_dtype: False keeps its blocks in the dtype of their layers.

        Raises:
            SiteError: Nothing matched, or a block cannot fit its layer.
            UsageError: The name is taken.
        """
        refuse_taken_name(self._adapters, adapter_name)
        self._mount(adapter_name, BoneConfig.of(peft_config))
        if not autocast_adapter_dtype:
            self._narrow(adapter_name)

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        **options: Any,
    ) -> LoadResult:
        """Add a trained adapter in PEFT's layout; `set_adapter` makes it active.

        As in PEFT, an adapter of that name gets the values in place, and the module goes to
        evaluation mode unless `is_trainable`. Other adapters train as they did.

        Args:
            model_id: Its folder, or a hub id.
            adapter_name: Its name.
            is_trainable: Whether the module keeps its mode. A frozen adapter trains once it is
                activated with `set_adapter(name)`, as in PEFT.
            torch_device: Taken as PEFT takes it; blocks go where their layers are.
            autocast_adapter_dtype: False keeps its blocks in the dtype of their layers.
            **options: `subfolder`, `revision`, `token` and `cache_dir` for the hub, and PEFT's
                options of loading.

        Raises:
            AdapterError: The folder is broken, or does not fit this model.
            SiteError: Its configuration matches nothing here.
            UsageError: An option that has no meaning here.
        """
        folder = read_trained(adapter_folder(model_id, **hub_options(options)), adapter_name)
        self._load(adapter_name, folder, is_trainable=is_trainable)
        if not autocast_adapter_dtype:
            self._narrow(adapter_name)
        if not is_trainable:
            self.eval()
        return LoadResult([], list(folder.unused))

    def _load(self, name: str, folder: TrainedFolder, *, is_trainable: bool) -> None:
        if name in self._adapters:
            self._take_values(name, folder)
            return
        self._mount(name, replace(folder.config, inference_mode=not is_trainable), folder)

    def set_adapter(
        self,
        adapter_name: str | Sequence[str],
        inference_mode: bool = False,
        *,
        train: str | Sequence[str] | None = None,
    ) -> None:
        """Make adapters active, in this order; their blocks train, those of the others are frozen.

        Args:
            adapter_name: The active adapters, one name or several.
            inference_mode: Whether none of them trains.
            train: Those of them that train; None for all.

        Raises:
            UsageError: A name that is not there or not active, or given twice; two adapters that
                train one module whole.
        """
        names = self._named(adapter_name)
        trained = names if train is None else self._named(train)
        if not set(trained) <= set(names):
            raise UsageError("only an active adapter can train", expected=names, found=trained)
        if len(set(names)) != len(names):
            raise UsageError(f"an adapter is named twice: {names}")
        self._refuse_two_heads(names)
        if self._merged:
            warnings.warn(f"{self._merged} were merged, and are no more", stacklevel=2)
        self._activate(names, [] if inference_mode else trained)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter and its blocks; the others stay as they are.

        Where none is active any more, the first of the others by name becomes so, as in PEFT.

        Raises:
            UsageError: There is no adapter of that name, or it is merged.
        """
        self._adapter(adapter_name)
        if adapter_name in self._merged:
            raise UsageError(f"adapter {adapter_name!r} is merged", next_step="unmerge_adapter()")
        left = sorted(set(self._adapters) - {adapter_name})
        active = [name for name in self.active_adapters if name != adapter_name]
        with self._change():
            del self._adapters[adapter_name]
            if self.active_adapters and not active and left:
                active = left[:1]
                warnings.warn(
                    f"adapter {adapter_name!r} was active and is deleted: {left[0]!r} is active",
                    stacklevel=2,
                )
                self._adapters[left[0]].train(not self._disabled)
            self.active_adapters = active

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """A context in which this is the base model, and no adapter trains.

        The graph has no adapters, not a flag that skips them. Both are kept until adapters change.
        """
        before = self._disabled
        self._set_disabled(True)
        try:
            yield
        finally:
            self._set_disabled(before)


PeftModel = AdaptedModule
"""PEFT's name, for programs that were written for it."""
