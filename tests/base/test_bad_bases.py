"""Bases that cannot be used: each is refused with the reason, and nothing is run or fetched."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import load_file, save_file

from bone_fx.base.loading import open_base, skeleton
from bone_fx.errors import BaseModelError, BoneFxError, UsageError
from bone_fx.weights.load_plan import recipes_for
from tests.capture.architectures import BY_NAME
from tests.weights.checkpoints import edit_json, save


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Llama in one file."""
    save(BY_NAME["llama"], tmp_path / "base")
    return tmp_path / "base"


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def _pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size - 5)


def _header_only(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 8 + b"{}")


def _no_tensors(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")


def _loose_shards(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")


def _index(**files: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "part.safetensors")
        index = {"weight_map": files} if files else {}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return write


def _two_shards(*, of: str = "") -> Callable[[Path], None]:
    """A second file that holds one of the first one's tensors; the index says where `of` is."""

    def write(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").rename(folder / "one.safetensors")
        name = "stranger" if of else next(iter(tensors))
        save_file({name: torch.ones(2)}, folder / "two.safetensors", metadata={"format": "pt"})
        places = {**dict.fromkeys(tensors, "one.safetensors"), name: "two.safetensors"}
        places |= {of: "two.safetensors"} if of else {}
        text = json.dumps({"weight_map": places})
        (folder / "model.safetensors.index.json").write_text(text)

    return write


def _config(**fields: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **fields)


def _config_text(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "config.json").write_text(text)

    return write


def _adapter(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    (folder / "adapter_config.json").write_text("{}")


REFUSED: list[tuple[Callable[[Path], None], str]] = [
    (shutil.rmtree, "does not exist"),
    (_empty, "no config.json"),
    (_no_config, "no config.json"),
    (_no_weights, "has no weights"),
    (_adapter, "is an adapter, not a base model"),
    (_pickles, "only as pickle files"),
    (_truncated, "cut off"),
    (_header_only, "claims"),
    (_no_tensors, "holds no weights"),
    (_loose_shards, "model-00001-of-00002"),
    (_index(), "no weight_map"),
    (_index(a="../part.safetensors"), "points out of its folder"),
    (_index(a="/etc/passwd"), "points out of its folder"),
    (_index(a="x/../../part.safetensors"), "points out of its folder"),
    (_index(a="gone.safetensors"), "gone"),
    (_index(a=3), "no file name"),
    (_index(a="config.json"), "not safetensors"),
    (_index(a="part.safetensors"), "which part.safetensors does not hold"),
    (_two_shards(), "two weight files in .* hold"),
    (_two_shards(of="model.norm.weight"), "which two.safetensors does not hold"),
    (_config(transformers_weights="../x.safetensors"), "points out of its folder"),
    (_config(transformers_weights=7), "transformers_weights"),
    (_config(quantization_config={"quant_method": "gptq", "bits": 4}), "'gptq'"),
    (_config(text_config={"quantization_config": {"quant_method": "fp8"}}), "'fp8'"),
    (_config(model_type="llamma"), "llamma"),
    (_config(hidden_size="wide"), "config.json"),
    (_config_text("{"), "not JSON"),
    (_config_text("[]"), "JSON object"),
    (_config_text("{}"), "config.json"),
]


@pytest.mark.parametrize(("damage", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refused(damage: Callable[[Path], None], message: str, folder: Path) -> None:
    damage(folder)
    with pytest.raises(BaseModelError, match=message) as caught:
        open_base(folder)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architectures": ["LlamaForEverything"]}, "LlamaForEverything"),
        ({"architectures": ["AutoTokenizer"]}, "AutoTokenizer"),
        ({"architectures": [[]]}, "no list of names"),
        ({"architectures": {"0": 0}}, "no list of names|config.json"),
        ({"num_attention_heads": 0}, "cannot be built|config.json"),
        ({"hidden_size": -64}, "cannot be built|config.json"),
        ({"hidden_act": "gelo"}, "cannot be built|config.json"),
        ({"vocab_size": 2**60}, "more than this checkpoint can have"),
        ({"hidden_size": 128}, "another shape"),
        ({"num_hidden_layers": 3}, "not in the checkpoint"),
    ],
)
def test_configs_that_do_not_make_the_model(
    fields: dict[str, Any], message: str, folder: Path
) -> None:
    edit_json(folder / "config.json", **fields)
    with pytest.raises(BaseModelError, match=message):
        _all_recipes(folder)


def _all_recipes(folder: Path) -> None:
    base = open_base(folder)
    recipes_for(*skeleton(base, torch.float32), base.tensors)


def test_code_in_a_checkpoint_is_not_run(folder: Path) -> None:
    (folder / "own.py").write_text("raise SystemExit('this ran')")
    edit_json(
        folder / "config.json",
        model_type="own",
        auto_map={"AutoConfig": "own.Own", "AutoModel": "own.Own"},
    )
    with pytest.raises(BaseModelError, match="--trust-remote-code"):
        open_base(folder)


def test_a_local_base_never_touches_the_network(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> NoReturn:
        raise AssertionError("a local folder was given")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    base = open_base(folder)
    recipes_for(*skeleton(base, torch.float32), base.tensors)
    with pytest.raises(UsageError, match="revisions"):
        open_base(folder, revision="main")


@pytest.mark.parametrize(
    "base", ["./nowhere", "/nowhere", "a/b/c", "nowhere.gguf", "~/nowhere", "", "a b", "-x"]
)
def test_what_is_neither_here_nor_an_id(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BoneFxError):
        open_base(base)


def test_hub_id_that_cannot_be_reached(tmp_path: Path) -> None:
    program = (
        "from bone_fx.base.loading import open_base\n"
        "from bone_fx.errors import BaseModelError\n"
        "try:\n    open_base('someone/something')\n"
        "except BaseModelError as error:\n"
        "    assert 'could not be fetched' in str(error), error\n"
        "    print('refused')\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "refused"
