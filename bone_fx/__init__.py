"""bone_fx: a compiler for block adapters (Bone, BAT, MiSS).

It rewrites a traced model to train block adapters, folds the trained blocks into constant weights,
and exports the result to ONNX for ONNX Runtime. `adapt`, `insert_adapters`, `fold_adapters` and
`export` are the four verbs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bone_fx.config import BoneConfig, MissConfig
    from bone_fx.deploy.export import ExportResult, export
    from bone_fx.deploy.fold_checkpoint import FoldResult, fold_checkpoint
    from bone_fx.deploy.verify_export import VerifyResult, verify_export
    from bone_fx.errors import BoneFxError
    from bone_fx.passes import PassResult, fold_adapters, insert_adapters
    from bone_fx.train.adapt import adapt, get_peft_model
    from bone_fx.train.adapted_module import AdaptedModule, PeftModel
    from bone_fx.train.peft_functions import (
        get_base_model_state_dict,
        get_peft_model_state_dict,
        hotswap_adapter,
        set_base_model_state_dict,
        set_peft_model_state_dict,
    )
    from bone_fx.train.trainer import AdapterTrainer

__version__ = "0.1.0"

_HOMES = {
    "AdaptedModule": "bone_fx.train.adapted_module",
    "AdapterTrainer": "bone_fx.train.trainer",
    "BoneConfig": "bone_fx.config",
    "BoneFxError": "bone_fx.errors",
    "ExportResult": "bone_fx.deploy.export",
    "FoldResult": "bone_fx.deploy.fold_checkpoint",
    "MissConfig": "bone_fx.config",
    "PeftModel": "bone_fx.train.adapted_module",
    "PassResult": "bone_fx.passes",
    "VerifyResult": "bone_fx.deploy.verify_export",
    "adapt": "bone_fx.train.adapt",
    "export": "bone_fx.deploy.export",
    "fold_adapters": "bone_fx.passes",
    "fold_checkpoint": "bone_fx.deploy.fold_checkpoint",
    "get_base_model_state_dict": "bone_fx.train.peft_functions",
    "get_peft_model": "bone_fx.train.adapt",
    "get_peft_model_state_dict": "bone_fx.train.peft_functions",
    "hotswap_adapter": "bone_fx.train.peft_functions",
    "insert_adapters": "bone_fx.passes",
    "set_base_model_state_dict": "bone_fx.train.peft_functions",
    "set_peft_model_state_dict": "bone_fx.train.peft_functions",
    "verify_export": "bone_fx.deploy.verify_export",
}

__all__ = [
    "AdaptedModule",
    "AdapterTrainer",
    "BoneConfig",
    "BoneFxError",
    "ExportResult",
    "FoldResult",
    "MissConfig",
    "PassResult",
    "PeftModel",
    "VerifyResult",
    "adapt",
    "export",
    "fold_adapters",
    "fold_checkpoint",
    "get_base_model_state_dict",
    "get_peft_model",
    "get_peft_model_state_dict",
    "hotswap_adapter",
    "insert_adapters",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
    "verify_export",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import bone_fx` stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module 'bone_fx' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
