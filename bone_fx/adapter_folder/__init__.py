"""Adapter folders in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`.

Folders are untrusted: safetensors only, and every tensor is taken or listed as unused.
"""

from bone_fx.adapter_folder.folder import WEIGHTS_NAME, AdapterFolder, TrainedFolder
from bone_fx.adapter_folder.reading import adapter_of_tensors, read_adapter, read_trained
from bone_fx.adapter_folder.several import Adapters, adapter_names, read_adapters
from bone_fx.adapter_folder.writing import PICKLE_NAME, adapter_tensors, write_adapter

__all__ = [
    "PICKLE_NAME",
    "WEIGHTS_NAME",
    "AdapterFolder",
    "Adapters",
    "TrainedFolder",
    "adapter_names",
    "adapter_of_tensors",
    "adapter_tensors",
    "read_adapter",
    "read_adapters",
    "read_trained",
    "write_adapter",
]
