"""The experts that a graph chose, as the reference takes them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from bone_fx.errors import VerificationError
from bone_fx.verify.decoder.routes import Choices, Routed
from bone_fx.verify.graph import WrittenGraph


class Router(nn.Module):
    """A router of tokens to two of their experts each."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.gate = nn.Identity()
        self.scores = scores

    def forward(self) -> Any:
        """The weights and the experts of each token."""
        return torch.topk(self.gate(self.scores), 2, dim=-1)


SCORES = torch.tensor([[0.0, 3.0, 2.0, 1.99, -1.0], [0.0, 3.0, 2.0, 1.0, -1.0]])


@pytest.mark.parametrize("scores", [SCORES, SCORES.softmax(-1)], ids=["scores", "probabilities"])
def test_a_choice_that_scores_allow_is_taken_with_their_own_scores(scores: Tensor) -> None:
    router = Router(scores)
    with Routed(router, 2, [torch.tensor([[3, 1], [1, 2]])], 1e-2) as routes:
        weights, chosen = router()
    assert chosen.tolist() == [[3, 1], [1, 2]] == routes.made[0].tolist()
    assert torch.equal(weights, scores.gather(1, chosen))


@pytest.mark.parametrize("scores", [SCORES, SCORES.softmax(-1)], ids=["scores", "probabilities"])
@pytest.mark.parametrize("wrong", [[2, 3], [1, 3], [1, 4]])
def test_a_choice_that_they_do_not_allow_is_named(scores: Tensor, wrong: list[int]) -> None:
    router = Router(scores)
    with (
        pytest.raises(VerificationError, match=r"a text: gate: token 1 goes to another expert"),
        Routed(router, 2, [torch.tensor([[1, 2], wrong])], 1e-2, "a text"),
    ):
        router()
    with Routed(router, 2, [torch.tensor([[1, 2], wrong])], math.inf):
        assert router().indices[1].tolist() == wrong


def test_another_number_of_experts_is_an_error() -> None:
    router = Router(SCORES)
    with (
        pytest.raises(VerificationError, match="another number of experts"),
        Routed(router, 2, [torch.tensor([[1], [1]])], 1e-2),
    ):
        router()


def test_tokens_and_choices_without_a_word_choose_by_themselves() -> None:
    router = Router(SCORES)
    with Routed(router, 2, [torch.tensor([[3, 1]])], 1e-2) as routes:
        router()
        router()
    assert [made.tolist() for made in routes.made] == [[[3, 1], [1, 2]], [[1, 2], [1, 2]]]


def test_experts_that_another_choice_ruled_out_are_no_scores() -> None:
    router = Router(torch.tensor([[3.0, 2.0, 1.999, -math.inf, -math.inf]]))
    with Routed(router, 1, [torch.tensor([[0, 2]])], 1e-2):
        router()
    with pytest.raises(VerificationError), Routed(router, 1, [torch.tensor([[0, 3]])], 1e-2):
        router()


def mixture(path: Path, experts: int, k: int, dtype: int) -> WrittenGraph:
    """A MoE whose output, `[S, X]`, is the weight of each expert: their biases are unit vectors."""
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    constants = {
        "up": np.zeros((experts, 2, experts), kind),
        "down": np.zeros((experts, experts, 1), kind),
        "bias": np.eye(experts, dtype=kind),
    }
    node = helper.make_node(
        "MoE", ["scores", "scores", "up", "", "down", "bias"], ["weights"],
        domain="com.microsoft", k=k, activation_type="swiglu", swiglu_fusion=1,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "mixture",
        [helper.make_tensor_value_info("scores", dtype, ["S", experts])],
        [helper.make_tensor_value_info("weights", dtype, ["S", experts])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return WrittenGraph(path, "cpu")


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.FLOAT16])
@pytest.mark.parametrize(("experts", "k"), [(64, 8), (10, 3)])
def test_equal_scores_go_where_the_operator_sends_them(
    dtype: int, experts: int, k: int, tmp_path: Path
) -> None:
    graph = mixture(tmp_path / "model.onnx", experts, k, dtype)
    choices = Choices.of(graph, ())
    session = graph.session(*choices.edits)
    scores = np.random.default_rng(0).integers(0, 4, (100, experts))
    given = scores.astype(helper.tensor_dtype_to_np_dtype(dtype))
    names = [value.name for value in session.get_outputs()]
    outputs = dict(zip(names, session.run(None, {"scores": given}), strict=True))
    [[chosen]] = choices.read(outputs, (1, 100))
    taken = torch.from_numpy(outputs["weights"]) > 0
    assert torch.equal(torch.zeros(100, experts, dtype=torch.bool).scatter(1, chosen, True), taken)
