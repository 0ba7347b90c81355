"""Adapted layers of one x against their definition in float64, and against PEFT's rounding."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from bone_fx.adapters import METHODS, bone
from bone_fx.errors import UsageError
from bone_fx.operators import ADAPTED_LINEARS, joint_linear
from tests.operators.saved import kept, shapes
from tests.tolerances import assert_agrees

# In features, then method, out features and block size of each layer that reads the input.
CASES: dict[str, tuple[int, list[tuple[str, int, int]]]] = {
    "bone": (48, [("bone", 80, 16), ("bone", 48, 16), ("bone", 24, 16)]),
    "bone of two sizes": (48, [("bone", 80, 16), ("bone", 24, 12), ("bone", 40, 16)]),
    "bone, ragged": (50, [("bone", 80, 16), ("bone", 30, 16)]),
    "bone, R > I": (24, [("bone", 48, 64), ("bone", 40, 64)]),
    "bone, R = I": (48, [("bone", 80, 48), ("bone", 30, 16)]),
    "bat": (48, [("bat", 80, 16), ("bat", 48, 16)]),
    "bat of two sizes": (48, [("bat", 80, 8), ("bat", 48, 16)]),
    "both": (48, [("bone", 80, 16), ("bat", 48, 16), ("bone", 40, 12)]),
}


class Problem(NamedTuple):
    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor | None]
    blocks: list[Tensor]
    methods: list[str]
    transposed: bool

    def run(self, *, recompute: bool = True) -> list[Tensor]:
        x, weights, biases, blocks, methods, transposed = self
        outputs: list[Tensor] = ADAPTED_LINEARS(
            x, weights, biases, blocks, methods, transposed, recompute
        )
        return outputs

    def expected(self) -> list[Tensor]:
        """`x W'ᵀ + b` with the weight folded as the definition says."""
        outputs = []
        for weight, bias, block, method in zip(*self[1:5], strict=True):
            w_OI = weight.t() if self.transposed else weight
            y = self.x @ folded(method, w_OI, block).t()
            outputs.append(y if bias is None else y + bias)
        return outputs

    def leaves(self) -> list[Tensor]:
        biases = [bias for bias in self.biases if bias is not None]
        return [self.x, *self.weights, *biases, *self.blocks]


def folded(method: str, w_OI: Tensor, block: Tensor) -> Tensor:
    """The definition: by column index for Bone, block by block for BAT."""
    if method == "bone":
        return w_OI + block[torch.arange(w_OI.shape[1]) % block.shape[0]].t()
    r = block.shape[-1]
    rows = []
    for a, b_RR in enumerate(block):
        parts = w_OI[a * r : (a + 1) * r].split(r, dim=1)
        rows.append(torch.cat([part + part @ b_RR + b_RR for part in parts], dim=1))
    return torch.cat(rows)


def make(
    case: str = "both", *, transposed: bool = False, dtype: torch.dtype = torch.float64
) -> Problem:
    """Every second layer has a bias; everything asks for a gradient."""
    in_features, sites = CASES[case]
    generator = torch.Generator().manual_seed(len(case))

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        values = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        return values.to(dtype).requires_grad_()

    weights, blocks = [], []
    biases: list[Tensor | None] = []
    for index, (method, out_features, r) in enumerate(sites):
        shape = (in_features, out_features) if transposed else (out_features, in_features)
        weights.append(random(*shape, scale=0.2))
        biases.append(random(out_features) if index % 2 else None)
        block = METHODS[method].block_shape(in_features, out_features, r, 0)
        blocks.append(random(*block, scale=0.3))
    return Problem(
        random(2, 3, in_features), weights, biases, blocks, [s[0] for s in sites], transposed
    )


def total(outputs: list[Tensor]) -> Tensor:
    """A loss under which every output has a gradient of its own."""
    return torch.stack([(y * torch.cos(3 * y)).sum() for y in outputs]).sum()


def gradients(outputs: list[Tensor], leaves: list[Tensor]) -> list[Tensor | None]:
    return list(torch.autograd.grad(total(outputs), leaves, allow_unused=True))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_the_definitions(case: str, transposed: bool) -> None:
    problem = make(case, transposed=transposed)
    ours, theirs = problem.run(), problem.expected()
    for found, expected in zip(ours, theirs, strict=True):
        assert_agrees(found, expected, "output")
    leaves = problem.leaves()
    for found, expected in zip(gradients(ours, leaves), gradients(theirs, leaves), strict=True):
        assert_agrees(found, expected, "gradient")


@pytest.mark.parametrize("case", ["bone of two sizes", "both"])
def test_gradients_agree_with_finite_differences(case: str) -> None:
    in_features, sites = 10, [(method, 8, r // 8) for method, _, r in CASES[case][1]]
    methods = [method for method, _, _ in sites]
    x = torch.randn(3, in_features, dtype=torch.float64, requires_grad=True)
    tensors = [x]
    for method, out_features, r in sites:
        tensors.append(torch.randn(out_features, in_features, dtype=torch.float64))
        shape = METHODS[method].block_shape(in_features, out_features, r, 0)
        tensors.append(torch.randn(shape, dtype=torch.float64, requires_grad=True))

    def run(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        blocks = list(rest[1::2])
        nothing = [None] * len(blocks)
        return tuple(ADAPTED_LINEARS(x, list(rest[0::2]), nothing, blocks, methods))

    assert torch.autograd.gradcheck(run, tuple(tensors))


@pytest.mark.parametrize("case", CASES)
def test_recomputing_changes_no_bit_and_neither_does_a_second_run(case: str) -> None:
    problem = make(case, dtype=torch.float32)
    runs = [problem.run(recompute=recompute) for recompute in (True, False, True)]
    found = [[*outputs, *gradients(outputs, problem.leaves())] for outputs in runs]
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("case", ["bone", "bat", "both"])
@pytest.mark.parametrize("asked", ["x", "weights", "biases", "blocks", "one block"])
def test_a_gradient_does_not_depend_on_what_else_is_asked_for(case: str, asked: str) -> None:
    problem = make(case)
    wanted = {
        "x": [problem.x],
        "weights": problem.weights,
        "biases": [bias for bias in problem.biases if bias is not None],
        "blocks": problem.blocks,
        "one block": problem.blocks[-1:],
    }[asked]
    whole = dict(zip(problem.leaves(), gradients(problem.run(), problem.leaves()), strict=True))
    for leaf in problem.leaves():
        leaf.requires_grad_(any(leaf is other for other in wanted))
    for leaf, found in zip(wanted, gradients(problem.run(), wanted), strict=True):
        assert torch.equal(found, whole[leaf])


@pytest.mark.parametrize("case", ["bone", "bat", "both"])
def test_outputs_that_nobody_reads_have_no_part_in_backward(case: str) -> None:
    problem = make(case)
    leaves = problem.leaves()
    found = gradients(problem.run()[1:2], leaves)
    expected = gradients(problem.expected()[1:2], leaves)
    for ours, theirs in zip(found, expected, strict=True):
        if theirs is None:
            assert ours is None
        else:
            assert_agrees(ours, theirs, "gradient")


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("bone")])
def test_both_forms_of_bone_agree(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make(case)
    found = []
    folds = 0
    fold = bone.fold

    def counted(*arguments: Tensor | None) -> Tensor:
        nonlocal folds
        folds += 1
        return fold(*arguments)

    monkeypatch.setattr(bone, "fold", counted)
    for limit in (float("inf"), 0.0):
        monkeypatch.setattr(joint_linear, "FOLD_ABOVE", {"cpu": limit})
        outputs = problem.run()
        found.append([*outputs, *gradients(outputs, problem.leaves())])
        assert folds == (0 if limit else 2 * len(problem.weights))
    for ours, theirs in zip(*found, strict=True):
        assert_agrees(ours, theirs, "gradient")
    half = [weight.to(torch.bfloat16) for weight in problem.weights]
    folds = 0
    problem._replace(x=problem.x.to(torch.bfloat16), weights=half).run()
    assert folds == 0  # a fold in a narrower dtype would round the block away


# PEFT's rounding.


def in_peft(weight: Tensor, bias: Tensor | None, block: Tensor, method: str) -> nn.Module:
    """PEFT 0.18.1's own layer over the same numbers."""
    from peft.tuners.bone.layer import BoneLinear

    base = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    with torch.no_grad():
        base.weight.copy_(weight)
        if bias is not None:
            base.bias.copy_(bias)
        init: Any = "bat" if method == "bat" else True
        r = block.shape[-1] if method == "bat" else block.shape[0]
        layer = BoneLinear(base, "default", r=r, init_weights=init)
        layer.bone_block["default"].data = block.detach().clone()  # float32, as get_peft_model
    return layer


@pytest.mark.skipif(
    not torch.backends.mkl.is_available(),  # type: ignore[no-untyped-call]
    reason="without MKL the bits of a product may depend on how it is cut",
)
@pytest.mark.parametrize("case", ["bone", "bone, ragged", "bat", "both"])
def test_results_and_gradients_are_those_of_peft_to_the_bit(case: str) -> None:
    problem = make(case, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layers: list[Any] = [in_peft(*of) for of in zip(*problem[1:5], strict=True)]
    ours, theirs = problem.run(), [layer(problem.x) for layer in layers]
    weights = [torch.linspace(-1, 1, y.numel()).view_as(y) for y in ours]
    blocks = [layer.bone_block["default"] for layer in layers]
    found = torch.autograd.grad(ours, [problem.x, *problem.blocks], weights)
    expected = torch.autograd.grad(theirs, [problem.x, *blocks], weights)
    for result, other in zip([*ours, *found], [*theirs, *expected], strict=True):
        assert torch.equal(result, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["bone", "bone, ragged", "bat", "both"])
def test_a_half_precision_base_is_rounded_as_in_peft(case: str, dtype: torch.dtype) -> None:
    """Blocks are float32, and so is every product that they take part in."""
    assert peft.__version__ == "0.18.1"
    whole = make(case, dtype=torch.float32)
    problem = whole._replace(
        x=whole.x.detach().to(dtype).requires_grad_(),
        weights=[w.detach().to(dtype) for w in whole.weights],
        biases=[None if b is None else b.detach().to(dtype) for b in whole.biases],
    )
    ours = problem.run()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layers: list[Any] = [in_peft(*of) for of in zip(*problem[1:5], strict=True)]
    theirs = [layer(problem.x) for layer in layers]
    for found, expected in zip(ours, theirs, strict=True):
        assert found.dtype == expected.dtype == dtype
        assert_agrees(found, expected, "output")
        assert float((found == expected).float().mean()) > 0.99  # one sum, rounded once
    weights = [torch.linspace(-1, 1, y.numel()).view_as(y).to(dtype) for y in ours]
    blocks = [layer.bone_block["default"] for layer in layers]
    found = torch.autograd.grad(ours, [problem.x, *problem.blocks], weights)
    expected = torch.autograd.grad(theirs, [problem.x, *blocks], weights)
    assert_agrees(found[0], expected[0], "output")
    for block, other in zip(found[1:], expected[1:], strict=True):
        assert block.dtype == torch.float32
        assert_agrees(block, other, "output")


@pytest.mark.parametrize("case", ["bone", "bat", "both"])
def test_autocast_computes_in_its_dtype_and_gradients_keep_theirs(case: str) -> None:
    problem = make(case, dtype=torch.float32)
    expected = problem.expected()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = problem.run()
    for found, exact in zip(ours, expected, strict=True):
        assert found.dtype == torch.float32  # of x, as in PEFT, over products in bfloat16
        assert torch.equal(found, found.bfloat16().float())
        assert_agrees(found, exact, "output", torch.bfloat16)
    weights = [torch.linspace(-1, 1, y.numel()).view_as(y) for y in ours]
    leaves = problem.leaves()
    found = torch.autograd.grad(ours, leaves, weights)
    exact = torch.autograd.grad(expected, leaves, weights)
    for gradient, other in zip(found, exact, strict=True):
        assert gradient.dtype == torch.float32
        assert_agrees(gradient, other, "gradient", torch.bfloat16)


@pytest.mark.parametrize("case", ["bone", "bat", "both"])
def test_a_backward_under_autocast_is_the_one_outside(case: str) -> None:
    problem = make(case, dtype=torch.float32)
    loss, again = total(problem.run()), total(problem.run())
    outside = torch.autograd.grad(loss, problem.leaves())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = torch.autograd.grad(again, problem.leaves())
    for found, expected in zip(inside, outside, strict=True):
        assert torch.equal(found, expected)


def test_second_derivatives_are_refused() -> None:
    problem = make("bone")
    first = torch.autograd.grad(total(problem.run()), problem.blocks[0], create_graph=True)[0]
    with pytest.raises(UsageError, match="second derivatives"):
        first.sum().backward()


# What is kept for backward.


def frozen_base(case: str) -> Problem:
    problem = make(case, dtype=torch.float32)
    for tensor in (*problem.weights, *problem.biases):
        if tensor is not None:
            tensor.requires_grad_(False)
    return problem


def own(problem: Problem) -> list[Tensor]:
    return [leaf for leaf in problem.leaves() if leaf is not problem.x]


def test_bone_keeps_the_shard_sums_once_and_no_input() -> None:
    problem = frozen_base("bone")
    assert shapes(kept(problem.run, *own(problem))) == [[6, 16]]
    problem = frozen_base("bone of two sizes")
    assert shapes(kept(problem.run, *own(problem))) == [[6, 12], [6, 16]]
    problem.weights[0].requires_grad_()
    assert shapes(kept(problem.run, *own(problem))) == [[6, 12], [6, 16], [6, 48]]


def test_nothing_is_kept_for_what_does_not_train() -> None:
    problem = frozen_base("bone")
    for block in problem.blocks:
        block.requires_grad_(False)
    assert not kept(problem.run, *own(problem))


def test_bat_keeps_the_input_and_a_folded_weight_only_if_asked_to() -> None:
    problem = frozen_base("bat")
    assert shapes(kept(problem.run, *own(problem))) == [[6, 48]]
    found = kept(lambda: problem.run(recompute=False), *own(problem))
    assert shapes(found) == [[6, 48], [48, 48], [80, 48]]
    with torch.no_grad():
        assert not kept(problem.run, *own(problem))


def test_a_traced_fold_is_a_product_and_sums_that_a_compiler_can_fuse() -> None:
    problem = frozen_base("bat")
    x, weights, biases, blocks, methods, _ = problem

    def call(x: Tensor, blocks: list[Tensor]) -> list[Tensor]:
        return joint_linear.joint_linear(x, weights, biases, blocks, methods)

    traced = make_fx(call)(x, blocks)
    names = [str(node.target) for node in traced.graph.nodes]
    assert names.count("aten.bmm.default") == 2
    assert not [name for name in names if "baddbmm" in name or "add_" in name]
    sizes = [list(n.meta["val"].shape) for n in traced.graph.nodes if "copy" in str(n.target)]
    assert sizes == [[1, 5, 16, 16], [1, 3, 16, 16]]
    for ours, theirs in zip(traced(x, blocks), problem.run(), strict=True):
        assert torch.equal(ours, theirs)
