"""The inputs that verification starts from are those that a model takes."""

from __future__ import annotations

import torch
from transformers import BertConfig, BertModel

from bone_fx.base.skeleton import skeleton_from_config
from bone_fx.deploy.builds.checkpoint_graph import random_inputs


def test_a_configuration_may_leave_the_size_of_the_vocabulary_open() -> None:
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = skeleton_from_config(config, torch.float32, BertModel)
    assert int(random_inputs(model)["input_ids"].max()) in range(2, 40)
    # As in a configuration of code that came with a checkpoint, whose fields nobody checks.
    model.config.__dict__.update(vocab_size=None)
    assert set(random_inputs(model)["input_ids"].flatten().tolist()) == {0, 1}
