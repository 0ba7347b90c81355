"""Small models of PEFT's tests' kind, under PEFT 0.18.1 and under bone_fx."""

from __future__ import annotations

import copy
import functools
import warnings
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import bone_fx


class Net(nn.Module):
    """Two layers with an uneven ratio, dropout, a norm, and a layer that forward leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 20)
        self.drop = nn.Dropout(0.5)
        self.prenorm = nn.LayerNorm(20)
        self.norm = nn.LayerNorm(20)
        self.lin1 = nn.Linear(20, 2)
        self.unused = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.drop(self.prenorm(self.lin0(x)).relu()))
        result: Tensor = self.lin1(hidden)
        return result


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def x_of_net() -> Tensor:
    return torch.randn(9, 10, generator=torch.Generator().manual_seed(1))


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
        "use_cache": False,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes}))


def in_peft(model: nn.Module, config: Any = None, **fields: Any) -> Any:
    """A model under PEFT, with a configuration or the fields of one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        name = fields.pop("adapter_name", "default")
        return peft.get_peft_model(model, config or peft_config(**fields), adapter_name=name)


def peft_config(**fields: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.BoneConfig(**{"r": 2, **fields})


def peft_load(model: nn.Module, folder: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(model, folder, **options)


@functools.cache
def _captured() -> bone_fx.AdaptedModule:
    config = bone_fx.BoneConfig(r=2, target_modules=["lin0"])
    return bone_fx.adapt(net(), config, (x_of_net(),), adapter_name="first")


def adapted_net(name: str = "default", **fields: Any) -> bone_fx.AdaptedModule:
    """A copy of one capture, with an adapter of these fields."""
    adapted = copy.deepcopy(_captured())
    adapted.add_adapter(name, bone_fx.BoneConfig(**{"r": 2, "target_modules": ["lin0"], **fields}))
    adapted.set_adapter(name)
    adapted.delete_adapter("first")
    return adapted


def trains(module: nn.Module) -> set[str]:
    """Names of what trains, as bone_fx has them."""
    names = (n for n, p in module.named_parameters() if p.requires_grad)
    return {
        n.removeprefix("base_model.model.").replace(".modules_to_save.default", "") for n in names
    }


def stir(adapted: bone_fx.AdaptedModule, name: str = "default") -> None:
    """Move an adapter's blocks off zero."""
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if key.endswith(f".bone_block.{name}"):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
