"""Verbs on files and values: save, restore, push, and an adapter's state in memory."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bone_fx.adapter_folder import (
    TrainedFolder,
    adapter_of_tensors,
    adapter_tensors,
    read_trained,
    write_adapter,
)
from bone_fx.base.hub import adapter_folder, upload
from bone_fx.config import BoneConfig
from bone_fx.dialects import find_sites
from bone_fx.errors import AdapterError, UsageError
from bone_fx.passes.insert import BLOCK
from bone_fx.train.adapter_set import AdapterSet
from bone_fx.train.mounting import copy_values, is_first_process, mounted_values


class Saving(AdapterSet):
    """An adapter set whose adapters go to folders, to the hub and to other modules."""

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: bool | str = "auto",
        is_main_process: bool | None = None,
        path_initial_model_for_weight_conversion: str | None = None,
        *,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        save_function: Any = None,
        **hub: Any,
    ) -> None:
        """Write adapters in PEFT's layout: `default` at the root, others in folders of their names.

        A model card is written beside them. Under FSDP2 every process must call it: blocks are
        gathered.

        Args:
            save_directory: Folder to write to.
            safe_serialization: False writes a pickle instead, for PEFT: it is not read here.
            selected_adapters: Names; None for all.
            save_embedding_layers: True writes the embeddings and the output layer too, `"auto"`
                those that an adapter brought, False none.
            is_main_process: Whether this process writes; None for the first of them only.
            path_initial_model_for_weight_conversion: Of PEFT's LoRA; must be None.
            state_dict: Values to write in place of the module's own, under its own names.
            push_to_hub: Upload the folder too, to `repo_id=`.
            save_function: Taken as PEFT takes it, which does not call it either.
            **hub: Arguments of `push_to_hub`.

        Raises:
            UsageError: An adapter that is not there, or a file in the folder's place.
        """
        if path_initial_model_for_weight_conversion is not None:
            raise UsageError(
                "path_initial_model_for_weight_conversion is an option of LoRA",
                next_step="leave it out: a block needs no conversion",
            )
        if is_main_process is None:
            is_main_process = is_first_process()
        names = list(self._adapters) if selected_adapters is None else list(selected_adapters)
        saved_configs = []
        for name in names:
            adapter = self._adapter(name)
            folder = Path(save_directory) if name == "default" else Path(save_directory) / name
            config = self._config_to_save(adapter.config)
            blocks, saved = self._values(name, state_dict)
            if save_embedding_layers is True:
                saved = self._embeddings() | saved
            elif save_embedding_layers is False:
                saved = {key: saved[key] for key in adapter.trained_names()}
            saved_configs.append((name, config))
            if is_main_process:
                write_adapter(folder, config, blocks, saved, as_safetensors=safe_serialization)
        if is_main_process and saved_configs:
            self._write_card(Path(save_directory), saved_configs)
        if is_main_process and push_to_hub:
            upload(Path(save_directory), **{"repo_id": Path(save_directory).name, **hub})

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload adapter",
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        **options: Any,
    ) -> str:
        """Save adapters and upload them to a repository of the hub, which is made if needed.

        Args:
            repo_id: `owner/name`.
            commit_message: Of the upload.
            private: Whether a new repository is private.
            token: Of the hub; None takes the one that is stored.
            revision: Branch to upload to.
            create_pr: Whether to open a pull request instead.
            **options: Arguments of `save_pretrained`.

        Returns:
            Address of the commit.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **options)
            return upload(
                Path(folder),
                repo_id,
                commit_message=commit_message,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
            )

    def create_or_update_model_card(self, output_dir: str | Path) -> None:
        """Write `README.md` into a folder as the hub wants it; a person's own text stays."""
        configs = [(name, adapter.config) for name, adapter in self._adapters.items()]
        self._write_card(Path(output_dir), configs)

    def restore(self, directory: str | Path) -> None:
        """Read every adapter's values again from what `save_pretrained` wrote, in place.

        Optimizers stay valid.

        Raises:
            AdapterError: A folder is missing, or of an adapter of another shape.
        """
        for name in self._adapters:
            place = Path(directory) if name == "default" else Path(directory) / name
            self._take_values(name, read_trained(place, name))

    def get_adapter_state(
        self, adapter_name: str = "default", state_dict: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """An adapter's tensors under the names of its file, over the memory of its parameters.

        Args:
            adapter_name: The adapter.
            state_dict: Values to take instead of the module's own, under its own names.
        """
        blocks, saved = self._values(adapter_name, state_dict)
        return adapter_tensors(self._adapter(adapter_name).config, blocks, saved)

    def set_adapter_state(self, state: Mapping[str, Tensor], adapter_name: str = "default") -> None:
        """Write values into an adapter's parameters, in place; optimizers stay valid.

        Args:
            state: Tensors under the names of an adapter's file, all of them.
            adapter_name: The adapter.

        Raises:
            AdapterError: A tensor is missing, belongs to no part of the adapter, or has another
                shape.
        """
        config = self._adapter(adapter_name).config
        where = f"the state for adapter {adapter_name!r}"
        self._take_values(adapter_name, adapter_of_tensors(config, state, where))

    def hotswap_adapter(
        self, model_id: str | Path, adapter_name: str = "default", **hub: Any
    ) -> None:
        """Put a saved adapter's values in place of an adapter's own, without writing a graph.

        The other adapters, the graph, what `torch.compile` made of it and optimizers stay.

        Args:
            model_id: Its folder, or a hub id.
            adapter_name: The adapter whose values are replaced.
            **hub: `revision`, `subfolder`, `token` and `cache_dir` for the hub.

        Raises:
            AdapterError: The saved adapter is of another method, or has other layers or shapes.
        """
        now = self._adapter(adapter_name).config
        folder = read_trained(adapter_folder(model_id, **hub), adapter_name)
        if folder.config.method != now.method:
            raise AdapterError(
                f"{folder.path} cannot take the place of adapter {adapter_name!r}",
                expected=f"the method {now.method}",
                found=folder.config.method,
                next_step="load it under another name",
            )
        self._take_values(adapter_name, folder)

    def _take_values(self, name: str, folder: TrainedFolder) -> None:
        adapter = self._adapter(name)
        search = find_sites(self._base)
        expected = replace(folder, config=adapter.config)
        expected.match(search.sites, search.others, self._origin.output_layers(adapter.config))
        copy_values(self, self._touched([name]), name, adapter, folder)
        if self._merged:  # the folded weights are of the values before
            with self._change():
                pass

    def _values(
        self, name: str, state_dict: Mapping[str, Tensor] | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """An adapter's blocks by site and its whole parameters by name, some from elsewhere."""
        sites = self._touched([name])
        blocks, saved = mounted_values(self, sites, name, self._adapter(name))
        given = state_dict or {}
        for site in sites:
            blocks[site.name] = given.get(f"{site.block_owner}.{BLOCK}.{name}", blocks[site.name])
        return blocks, {key: given.get(key, value) for key, value in saved.items()}

    def _config_to_save(self, config: BoneConfig) -> BoneConfig:
        config = copy.deepcopy(config)
        model = self._origin.model
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = getattr(self.config, "_name_or_path", None) or None
        if config.task_type is None and model is not None:
            kind = type(model)
            config.auto_mapping = {
                "base_model_class": kind.__name__,
                "parent_library": kind.__module__,
            }
        config.inference_mode = True
        return config

    def _embeddings(self) -> dict[str, Tensor]:
        """Weights of the model's embeddings and output layer, by name."""
        model: Any = self._origin.model
        parts = [
            find() if callable(find := getattr(model, verb, None)) else None
            for verb in ("get_input_embeddings", "get_output_embeddings")
        ]
        weights = {f"{n}.weight" for n, m in model.named_modules() if any(m is p for p in parts)}
        adapted = {site.weight_name for site in self._touched(list(self._adapters))}
        if not weights:
            said = f"{type(model).__name__} does not say which its embeddings are: none is saved"
            warnings.warn(said, stacklevel=3)
        return {
            name: p.detach()
            for name, p in self._base.named_parameters(remove_duplicate=False)
            if name in weights - adapted
        }

    def _write_card(self, folder: Path, configs: list[tuple[str, BoneConfig]]) -> None:
        from bone_fx.train.verbs.model_card import write_model_card

        model: nn.Module | None = self._origin.model
        write_model_card(folder, model, configs)
