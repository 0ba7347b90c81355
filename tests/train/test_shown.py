"""What an adapted module shows of itself."""

from __future__ import annotations

import pytest

import bone_fx
from tests.train.peft_models import llama

pytestmark = pytest.mark.usefixtures("captures_once")


def test_a_few_lines_and_a_table() -> None:
    config = bone_fx.BoneConfig(
        r=8, target_modules=["q_proj", "v_proj", "down_proj"], modules_to_save=["lm_head"]
    )
    adapted = bone_fx.get_peft_model(llama(), config)
    adapted.add_adapter("<b>", bone_fx.BoneConfig(r=4, target_modules=["q_proj"]))
    trained, total = adapted.get_nb_trainable_parameters()
    share = f"{trained:,} of {total:,} parameters train ({100 * trained / total:.2f} %)"
    assert repr(adapted).splitlines() == [
        f"AdaptedModule of LlamaForCausalLM: {share}",
        "  adapter                        layers          weight   block",
        "  default  bone, active, trains  2 x q_proj      32 x 32  8 x 32",
        "                                 2 x v_proj      16 x 32  8 x 16",
        "                                 2 x down_proj   32 x 48  8 x 32",
        "                                 lm_head.weight  64 x 32  whole",
        "  <b>      bone, off, frozen     2 x q_proj      32 x 32  4 x 32",
    ]
    table = adapted._repr_html_()
    assert "<td>&lt;b&gt;</td>" in table
    assert table.count("<tr>") == 6
    with adapted.disable_adapter():
        assert repr(adapted).splitlines()[0].endswith("(0.00 %), adapters off")


def test_many_adapters_are_cut() -> None:
    adapted = bone_fx.get_peft_model(llama(), bone_fx.BoneConfig(r=8, target_modules=["q_proj"]))
    adapter = adapted._adapters["default"]
    adapted.__dict__["_adapters"] = {f"a{i}": adapter for i in range(60)}
    assert len(repr(adapted).splitlines()) <= 40
    assert "and 36 more" in repr(adapted)
