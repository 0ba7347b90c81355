"""What each of two gloo processes does: trains a tiny Llama under FSDP2 or DDP, notes what it saw.

Run as `torchrun --nproc-per-node 2 -m tests.distributed.two_processes OUT`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import bone_fx
from tests.end_to_end.test_adapted import llama

STEPS = 4
CONFIG = bone_fx.BoneConfig(r=16, target_modules="all-linear", modules_to_save=["norm"])


def batch() -> torch.Tensor:
    return torch.randint(0, 96, (4, 7), generator=torch.Generator().manual_seed(1))


def adapted(**options: Any) -> bone_fx.AdaptedModule:
    return bone_fx.adapt(llama(), CONFIG, {"input_ids": batch()}, **options).train()


def losses(call: Any, module: bone_fx.AdaptedModule, ids: torch.Tensor) -> list[torch.Tensor]:
    optimizer = torch.optim.AdamW(module.parameter_groups(), lr=1e-2)
    found = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = call(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        found.append(loss.detach().clone())
    return found


def restores(module: bone_fx.AdaptedModule, folder: Path) -> bool:
    """Whether `restore` gives trained parameters, sharded ones too, their values back."""
    trained = [p for p in module.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    with torch.no_grad():
        for parameter in trained:
            parameter.zero_()
    module.restore(folder)
    return all(torch.equal(local(p), local(old)) for p, old in zip(trained, before, strict=True))


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor."""
    part: torch.Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return part


def main(out: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    ids = batch()[2 * rank : 2 * rank + 2]
    notes: dict[str, Any] = {}
    for kind in ("ddp", "fsdp", "fsdp+checkpointing"):
        module = adapted(gradient_checkpointing=kind == "fsdp+checkpointing")
        call: Any = module
        if kind == "ddp":
            call = DistributedDataParallel(module)
        else:
            mesh = init_device_mesh("cpu", (2,))
            layers = module.layer_modules()
            gathered: list[list[bool]] = []
            for layer in layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(module, mesh=mesh)
            second = layers[1].register_forward_pre_hook(
                lambda *_, layers=layers, gathered=gathered: gathered.append(
                    [any(hasattr(p, "full_tensor") for p in layer.parameters()) for layer in layers]
                )
            )
        found = torch.stack(losses(call, module, ids))
        dist.all_reduce(found)
        notes[kind] = {"losses": (found / 2).tolist()}
        module.save_pretrained(out / kind)
        dist.barrier()
        notes[kind]["restored"] = restores(module, out / kind)
        if kind != "ddp":
            second.remove()
            notes[kind]["sharded in the second layer"] = gathered[0]
            block = module.get_parameter("model.layers.1.mlp.up_proj.bone_block.default")
            notes[kind]["rows"] = [block.to_local().shape[0], block.shape[0]]
    (out / f"rank{rank}.json").write_text(json.dumps(notes))
    dist.barrier()
    dist.destroy_process_group()


def leave() -> None:
    """End this process without Python's own end.

    FSDP2 keeps a gloo group's threads alive, and one that frees a tensor while Python ends aborts
    (PyTorch 2.13: a thread that waits for the interpreter is unwound through a C++ destructor).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave()
