"""What an export is made of before it is written: an ONNX model over recipes, and how to verify it.

A checkpoint becomes a `CheckpointBuild`, captured as a decoder with a cache if it generates, else
by its forward; a module of the user's own becomes a `ModuleBuild`.
"""

from __future__ import annotations

from bone_fx.deploy.builds.base import Build, Written
from bone_fx.deploy.builds.checkpoint import CheckpointBuild, build_checkpoint
from bone_fx.deploy.builds.module import ModuleBuild, build_module

__all__ = [
    "Build",
    "CheckpointBuild",
    "ModuleBuild",
    "Written",
    "build_checkpoint",
    "build_module",
]
