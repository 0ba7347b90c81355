"""Train under FSDP2, one shard group a layer, in as many processes as torchrun starts.

Run: torchrun --nproc-per-node 2 examples/fsdp2.py BASE OUTPUT_FOLDER [STEPS]
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

import bone_fx


def main(base: str, output: str, steps: int = 4) -> None:
    """Shard, train on rows of one's own, save once."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    if device == "cuda":
        torch.cuda.set_device(rank)
    torch.manual_seed(0)  # blocks must start equal everywhere
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    rows = torch.randint(0, model.config.vocab_size, (2 * processes, 16))
    mine = rows[2 * rank : 2 * rank + 2].to(device)

    config = bone_fx.BoneConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = bone_fx.adapt(model, config, {"input_ids": rows}, gradient_checkpointing=True).train()
    mesh = init_device_mesh(device, (processes,))
    for layer in adapted.layer_modules():
        fully_shard(layer, mesh=mesh)
    fully_shard(adapted, mesh=mesh)

    optimizer = torch.optim.AdamW(adapted.parameter_groups(), lr=1e-2)  # after sharding
    for step in range(steps):
        optimizer.zero_grad()
        loss = adapted(input_ids=mine, labels=mine).loss
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        if rank == 0:
            print(f"step {step}: loss {mean.item() / processes:.4f}", flush=True)
    adapted.save_pretrained(output)  # every process gathers, the first one writes
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
    os._exit(0)  # PyTorch 2.13: a thread of gloo's that frees a tensor while Python ends aborts
