"""Adapters go to a hub and come back, through `huggingface_hub` and a server of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hub import REPOSITORY, local_hub

ROOT = Path(__file__).parents[2]
PROGRAM = f"""
import torch, bone_fx
from bone_fx.errors import AdapterError
from tests.train.peft_models import adapted_net, net, stir, x_of_net

x = x_of_net()
ours = adapted_net().eval()
ours.add_adapter("other", bone_fx.BoneConfig(r=2, target_modules=["lin1"]))
stir(ours)
stir(ours, "other")
print(ours.push_to_hub("{REPOSITORY}", private=True, token="hf_x"))
again = bone_fx.PeftModel.from_pretrained(net(), "{REPOSITORY}", example_inputs=(x,))
assert torch.equal(again(x), ours(x))
again.load_adapter("{REPOSITORY}", "other", subfolder="other", revision="main")
again.set_adapter("other")
ours.set_adapter("other")
assert torch.equal(again(x), ours(x))
again.set_adapter("default")
assert torch.equal(bone_fx.adapt(net(), "{REPOSITORY}", (x,)).eval()(x), again(x))
try:
    again.load_adapter("me/nothing", "third")
except AdapterError as error:
    assert "could not be fetched" in str(error)
else:
    raise AssertionError("an adapter that is not there")
"""


@pytest.mark.slow
def test_an_adapter_goes_to_the_hub_and_comes_back(tmp_path: Path) -> None:
    with local_hub() as hub:
        env = {
            **os.environ,
            "HF_ENDPOINT": hub.address,
            "HF_HOME": str(tmp_path),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], env=env, cwd=ROOT, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr
    assert f"{REPOSITORY}/commit/" in done.stdout
    expected = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert set(hub.files) == expected | {f"other/{name}" for name in expected - {"README.md"}}
