"""Rewrite a module that you traced yourself: insert blocks, train them, fold them, export to ONNX.

Run: python examples/own_graph.py OUTPUT_FOLDER
"""

from __future__ import annotations

import sys

import torch
from torch import nn
from torch.nn import functional

import bone_fx


def main(output: str) -> None:
    """Teach a small network a rotation of its own output, touching blocks only."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(50, 80), nn.ReLU(), nn.Linear(80, 8))
    x = torch.randn(64, 50)
    target = net(x).detach().roll(1, dims=1)

    traced = torch.fx.symbolic_trace(net)
    config = bone_fx.BoneConfig(r=16, target_modules="all-linear")
    adapted = bone_fx.insert_adapters(traced, config).graph_module
    print(adapted.graph)

    blocks = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(blocks, lr=1e-2)
    for step in range(200):
        loss = functional.mse_loss(adapted(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == 199:
            print(f"step {step}: loss {loss.item():.4f}")

    folded = bone_fx.fold_adapters(adapted).graph_module
    result = bone_fx.export(folded, output=output, example_inputs=(x[:3],), overwrite=True)
    print(f"{result.output}: verified={result.verified}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1])
