"""What is refused of the LoRA family: each by name, with what to do, and no work without bounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bone_fx
from bone_fx.adapter_folder import read_adapter
from bone_fx.errors import AdapterError, BoneFxError, ConfigError, SiteError
from bone_fx.lora.refused import CONVERTIBLE
from tests.lora.folders import PREFIX, UP, Q, pairs, under_prefix, write
from tests.lora.peft_cases import llama, tied

FIELDS: dict[str, tuple[Any, str]] = {
    "alora_invocation_tokens": ([7, 8], "vLLM"),
    "arrow_config": ({"top_k": 3}, "PEFT"),
    "kasa_config": ({"beta": 0.1}, "merge"),
    "layer_replication": ([[0, 2], [0, 2]], "repeated layers"),
    "megatron_config": ({"a": 1}, "convert"),
    "monteclora_config": ({"num_samples": 4}, "merge"),
    "use_bdlora": ({"nblocks": 2}, "merge"),
    "use_qalora": (True, "merge"),
    "velora_config": ({"num_groups": 4}, "merge"),
    "of_a_later_version": (0.5, "merge"),
}


@pytest.mark.parametrize("name", FIELDS)
def test_fields_by_name(name: str, tmp_path: Path) -> None:
    value, step = FIELDS[name]
    folder = write(tmp_path / "adapter", under_prefix(pairs()), **{name: value})
    with pytest.raises(ConfigError, match=name) as caught:
        read_adapter(folder)
    assert step in str(caught.value.next_step)


@pytest.mark.parametrize("value", [None, False, 0, "", [], {}])
def test_fields_that_say_nothing_are_no_reason(value: Any, tmp_path: Path) -> None:
    fields = dict.fromkeys([*FIELDS, "layers_pattern", "rank_pattern"], value)
    fields |= {"rank_pattern": {}, "layers_pattern": None}
    read_adapter(write(tmp_path / "adapter", under_prefix(pairs()), **fields))


@pytest.mark.parametrize(
    "init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "mica", "newest"]
)
def test_initialisations_that_change_the_base(init: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", under_prefix(pairs()), init_lora_weights=init)
    with pytest.raises(ConfigError, match=f"init_lora_weights='{init}'") as caught:
        read_adapter(folder)
    converts = "path_initial_model_for_weight_conversion" in str(caught.value.next_step)
    assert converts == (init[:5] in ("pissa", "olora", "corda", "lora_"))


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal"])
def test_initialisations_that_leave_it(init: Any, tmp_path: Path) -> None:
    read_adapter(write(tmp_path / "adapter", under_prefix(pairs()), init_lora_weights=init))


KINDS = {
    **dict.fromkeys(CONVERTIBLE, "save_as_lora"),
    **dict.fromkeys(("IA3", "OFT", "BOFT", "HRA", "LN_TUNING", "ROAD", "NEW"), "merge"),
    **dict.fromkeys(("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING"), "without it"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds(kind: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", under_prefix(pairs()), peft_type=kind)
    with pytest.raises(ConfigError, match=kind) as caught:
        read_adapter(folder)
    assert KINDS[kind] in str(caught.value.next_step)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("r", 0), ("r", 2.5), ("r", "4"), ("r", True), ("r", 1 << 40), ("lora_alpha", "6"),
        ("lora_alpha", float("inf")), ("rank_pattern", {"q_proj": 0}), ("rank_pattern", [3]),
        ("alpha_pattern", {"q_proj": None}), ("use_rslora", "yes"), ("use_dora", 1),
        ("target_modules", 3), ("target_parameters", "experts.down_proj"), ("bias", "some"),
        ("trainable_token_indices", [-1]), ("trainable_token_indices", {"wte": 3}),
        ("modules_to_save", "lm_head"), ("layers_to_transform", "1"), ("task_type", "CHAT"),
    ],
)  # fmt: skip
def test_values(name: str, value: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", under_prefix(pairs()), **{name: value})
    with pytest.raises(ConfigError, match=name):
        read_adapter(folder)


def _refused(folder: Path, base: Any = None, **options: Any) -> BoneFxError:
    (base or llama()).save_pretrained(folder.parent / "base")
    with pytest.raises(AdapterError) as caught:
        bone_fx.fold_checkpoint(
            folder.parent / "base", adapters=[folder], output=folder.parent / "out", **options
        )
    return caught.value


@pytest.mark.parametrize(
    "name",
    [
        f"{UP}.lora_diag",
        f"{UP}.lora_B.bias",
        f"{UP}.lora_magnitude_vector",
        f"{UP}.lora_A.bias",
        f"{UP}.weight",
        f"{Q}.lora_A.left.right.weight",
        f"{PREFIX}{Q}.lora_A.weight",
    ],
)
def test_a_tensor_that_nothing_takes(name: str, tmp_path: Path) -> None:
    tensors = under_prefix({**pairs(), name: torch.zeros(80)})
    error = _refused(write(tmp_path / "adapter", tensors))
    assert name.removeprefix(PREFIX) in error.what
    assert "--allow-unused" in str(error.next_step)


def test_a_tensor_that_is_given_up(tmp_path: Path) -> None:
    extra = PREFIX + f"{UP}.lora_diag"
    folder = write(tmp_path / "adapter", {**under_prefix(pairs()), extra: torch.zeros(80)})
    llama().save_pretrained(tmp_path / "base")
    result = bone_fx.fold_checkpoint(
        tmp_path / "base", adapters=[folder], output=tmp_path / "out", allow_unused=[extra]
    )
    assert any(extra in note for note in result.warnings)


def test_a_layer_that_lacks_a_part(tmp_path: Path) -> None:
    tensors = under_prefix(pairs())
    del tensors[f"{PREFIX}{Q}.lora_B.weight"]
    with pytest.raises(AdapterError, match=r"q_proj lacks lora_B\.weight"):
        read_adapter(write(tmp_path / "adapter", tensors))


def test_dora_without_lengths(tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", under_prefix(pairs()), use_dora=True)
    with pytest.raises(AdapterError, match="lacks lora_magnitude_vector"):
        read_adapter(folder)


def test_another_rank_than_the_configuration_says(tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", under_prefix(pairs()), rank_pattern={"q_proj": 3})
    with pytest.raises(AdapterError, match="q_proj have wrong shapes"):
        read_adapter(folder)


def test_a_layer_of_another_width(tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", under_prefix(pairs()))
    error = _refused(folder, llama(intermediate_size=88))
    assert "up_proj has the wrong shape" in error.what


def test_a_layer_that_the_model_has_not(tmp_path: Path) -> None:
    tensors = {name.replace("layers.1", "layers.7"): t for name, t in pairs().items()}
    targets = [UP, Q, Q.replace("1", "7")]
    error = _refused(write(tmp_path / "adapter", under_prefix(tensors), target_modules=targets))
    assert "layers.7" in str(error.found)


def test_a_target_that_the_file_lacks(tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", under_prefix(pairs()), target_modules=["up_proj", Q])
    error = _refused(folder)
    assert "model.layers.1.mlp.up_proj" in str(error.expected)


@pytest.mark.parametrize("pattern", ["(((", r"(?:\w|\.|[a-z])+(?=#)"])
def test_patterns_that_are_none_or_take_too_long(pattern: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", under_prefix(pairs()), rank_pattern={pattern: 3})
    with pytest.raises(SiteError, match="regular expression"):
        read_adapter(folder)


def test_values_that_are_not_finite_or_no_floats(tmp_path: Path) -> None:
    tensors = under_prefix(pairs())
    name = f"{PREFIX}{Q}.lora_A.weight"
    with pytest.raises(AdapterError, match="NaN or Inf"):
        read_adapter(write(tmp_path / "nan", {**tensors, name: tensors[name] * float("nan")}))
    with pytest.raises(AdapterError, match="holds no floats"):
        read_adapter(write(tmp_path / "codes", {**tensors, name: tensors[name].to(torch.int8)}))


@pytest.mark.parametrize(("tokens", "rows"), [([3, 5], 3), ([3, 3], 2), ([3, 500], 2), (None, 2)])
def test_tokens_that_are_not_the_model_s(tokens: Any, rows: int, tmp_path: Path) -> None:
    name = "model.embed_tokens.token_adapter.trainable_tokens_delta"
    tensors = under_prefix({**pairs(), name: torch.zeros(rows, 48)})
    error = _refused(write(tmp_path / "adapter", tensors, trainable_token_indices=tokens))
    assert "embed_tokens" in error.what


def test_two_dora_on_one_layer(tmp_path: Path) -> None:
    lengths = {f"{UP}.lora_magnitude_vector": torch.ones(80)}
    lengths |= {f"{Q}.lora_magnitude_vector": torch.ones(48)}
    tensors = under_prefix({**pairs(), **lengths})
    adapters = [write(tmp_path / name, tensors, use_dora=True) for name in ("one", "two")]
    llama().save_pretrained(tmp_path / "base")
    with pytest.raises(AdapterError, match="has two DoRA adapters"):
        bone_fx.fold_checkpoint(tmp_path / "base", adapters=adapters, output=tmp_path / "out")


def test_one_side_of_a_pair_that_was_trained_as_one(tmp_path: Path) -> None:
    tensors = under_prefix(
        {"lm_head.lora_A.weight": torch.zeros(4, 48), "lm_head.lora_B.weight": torch.zeros(103, 4)}
    )
    fields = {"target_modules": ["lm_head"], "ensure_weight_tying": True}
    error = _refused(write(tmp_path / "adapter", tensors, **fields), tied())
    assert "ensure_weight_tying" in error.what


def test_is_not_trained(tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", under_prefix(pairs()))
    with pytest.raises(AdapterError, match="not trained here") as caught:
        bone_fx.adapt(nn.Sequential(nn.Linear(48, 80)), folder, [torch.randn(3, 48)])
    assert "bone-export" in str(caught.value.next_step)
