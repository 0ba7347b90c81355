"""The part of a trace that is a model's own attention, found and run.

A region begins at the two `Present` marks of a layer (`joining_cache`) and at the queries, and ends
where all that depends on the marks has come together and been laid out as [B, S, H*D]. It is run on
small texts, padded ones and ones with a past, and compared with the definition: softmax over the
earlier tokens of the row of scale * query · key, plus a number that depends on the head and on the
position of the key among the tokens of its row.

Shape letters: B batch, H query heads, K key/value heads, S new tokens, T past and new tokens, D
head size, M positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node
from torch.fx.node import map_arg

from bone_fx.capture.decoder.own_attention.joining_cache import PRESENT, Computed
from bone_fx.capture.decoder.own_attention.shared_heads import groups_of
from bone_fx.errors import CaptureError, first_line
from bone_fx.lower.stamp import DOMAIN, EXIT
from bone_fx.lower.symbolic import attributes, is_operator, operands

aten = torch.ops.aten

LAYOUT = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.transpose.int,
    aten.permute.default, aten.contiguous.default, aten.clone.default, aten.alias.default,
    aten.flatten.using_ints, aten.unflatten.int, aten.unsqueeze.default, aten.squeeze.dim,
}  # fmt: skip
SOFTMAX = {aten.softmax.int, aten._softmax.default}
FUSED = aten.scaled_dot_product_attention.default
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
HIDDEN = 1e3
"""A score so far below the others has no weight."""

# Masks of the texts on trial, and the number of new tokens: whole, padded, one token after a
# padded text, several tokens after a text.
TRIALS: tuple[tuple[list[list[int]], int], ...] = (
    ([[1] * 7], 7),
    ([[1] * 5, [1, 1, 1, 0, 0]], 5),
    ([[1] * 6, [1, 1, 1, 0, 0, 1]], 1),
    ([[1] * 8], 3),
)


@dataclass(frozen=True)
class Region:
    """One layer's own attention in a trace.

    Attributes:
        layer: Number of the layer.
        key: The mark of the joined keys.
        value: The mark of the joined values.
        query: The queries [B, H, S, D].
        output: What leaves it, [B, S, H*D].
    """

    layer: int
    key: Node
    value: Node
    query: Node
    output: Node


def attention_regions(program: ExportedProgram) -> list[Region]:
    """The regions of a trace, one a traced layer.

    Raises:
        CaptureError: What stands behind the marks has not the form of an attention.
    """
    marks: dict[int, list[Node]] = {}
    for node in program.graph.nodes:
        if is_operator(node, DOMAIN, PRESENT):
            marks.setdefault(int(attributes(node)["layer"]), []).append(node)  # type: ignore[arg-type]  # a number
    regions = []
    for layer, (key, value) in marks.items():
        output, inside = _end(key, value, layer)
        regions.append(Region(layer, key, value, _queries(key, inside, layer), output))
    return regions


def _refuse(layer: int, found: str) -> CaptureError:
    return CaptureError(
        f"the attention of layer {layer} does not go through transformers' attention interface, "
        "and what it computes is not recognised",
        expected="softmax over earlier tokens of scaled products, with or without ALiBi",
        found=found,
        next_step="this architecture cannot be exported as a decoder yet",
    )


def _end(key: Node, value: Node, layer: int) -> tuple[Node, set[Node]]:
    """Where all that depends on the marks has come together, and what does until there."""

    def readers(node: Node) -> set[Node]:
        return {
            user
            for user in node.users
            if user.op != "output"
            and not is_operator(user, DOMAIN, EXIT)
            and user.target is not aten.sym_size.int
        }

    waiting = {mark: readers(mark) for mark in (key, value)}
    inside = {key, value}
    node = max(key, value)
    while node.op != "output":
        node = node.next
        if not any(node in users for users in waiting.values()):
            continue
        inside.add(node)
        waiting[node] = readers(node)
        for users in waiting.values():
            users.discard(node)
        waiting = {n: users for n, users in waiting.items() if users}
        if set(waiting) == {node}:
            return _laid_out(node, key, layer), inside
    raise _refuse(layer, "keys and values that do not come together")


def _laid_out(node: Node, key: Node, layer: int) -> Node:
    batch, size = key.meta["val"].shape[0], key.meta["val"].shape[3]
    while True:
        shape = node.meta["val"].shape
        rows = len(shape) == 3 and str(shape[0]) == str(batch) and isinstance(shape[1], SymInt)
        if rows and isinstance(shape[2], int) and shape[2] % size == 0:
            return node
        following = [user for user in node.users if user.target is not aten.sym_size.int]
        if len(following) != 1 or following[0].target not in LAYOUT:
            raise _refuse(layer, f"an output of shape {tuple(shape)}")
        node = following[0]


def _queries(key: Node, inside: set[Node], layer: int) -> Node:
    """The one tensor that enters besides marks and what comes from the mask."""
    entering = {n for node in inside - {key} for n in node.all_input_nodes if n not in inside}
    found = {n for n in entering if isinstance(n.meta.get("val"), Tensor) and not _of_mask(n)}
    found = {n for n in found if not any(is_operator(u, DOMAIN, PRESENT) for u in n.users)}
    if len(found) != 1:
        raise _refuse(layer, f"{len(found)} tensors in the place of the queries")
    node = found.pop()
    size = key.meta["val"].shape[3]
    while True:
        shape = node.meta["val"].shape
        heads = len(shape) == 4 and isinstance(shape[1], int) and isinstance(shape[2], SymInt)
        if heads and shape[3] == size:
            return node
        source = node.args[0] if node.target in LAYOUT else None
        if not isinstance(source, Node):
            raise _refuse(layer, f"queries of shape {tuple(shape)}")
        node = source


def _of_mask(node: Node) -> bool:
    """Whether a tensor is computed from the attention mask, sizes and constants alone."""
    waiting, seen = [node], {node}
    while waiting:
        node = waiting.pop()
        if node.op == "placeholder":
            if node.meta["val"].is_floating_point() and node.meta["val"].dim() > 1:
                return False
            continue
        if is_operator(node, DOMAIN, PRESENT) or len(seen) > 400:
            return False
        sources = (
            [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
            if node.target is not aten.sym_size.int
            else []
        )
        waiting += [n for n in sources if n not in seen]
        seen.update(sources)
    return True


class _UnlikeError(Exception):
    """A region computes something else than the definition."""


class Runner:
    """Runs parts of a program on values given for some of its nodes."""

    def __init__(self, program: ExportedProgram) -> None:
        signature = program.graph_signature
        nodes = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
        given = [nodes[s.arg.name] for s in signature.input_specs if s.kind == InputKind.USER_INPUT]
        self.ids, self.mask, self.past = given[:3]
        stored = {**program.state_dict, **program.constants}
        self.constants = {
            nodes[s.arg.name]: stored[s.target]
            for s in signature.input_specs
            if s.kind in (InputKind.BUFFER, InputKind.CONSTANT_TENSOR) and s.target in stored
        }

    def run(
        self, wanted: Sequence[Node], given: Mapping[Node, Tensor], mask: Tensor, tokens: int
    ) -> list[Tensor]:
        """The values of some nodes, for a mask [B, T] and a number S of new tokens.

        Raises:
            _UnlikeError: They cannot be had from what is given, or not for these sizes.
        """
        batch, total = mask.shape
        sizes: dict[Any, int] = {}
        for node, shape in (
            (self.ids, (batch, tokens)), (self.mask, (batch, total)),
            (self.past, (batch, None, total - tokens, None)),
        ):  # fmt: skip
            for symbol, number in zip(node.meta["val"].shape, shape, strict=True):
                if isinstance(symbol, SymInt) and number is not None:
                    sizes[symbol.node.expr] = number
        values: dict[Node, Any] = {**self.constants, **given, self.mask: mask}

        def value(node: Node) -> Any:
            if node not in values:
                known = node.meta.get("val")
                if isinstance(known, SymInt):
                    size = known.node.expr.xreplace(sizes)
                    if getattr(size, "free_symbols", ()):  # a symbol alone became a number
                        raise _UnlikeError(f"{node.name}, a size of {size}")
                    values[node] = int(size)
                elif node.op != "call_function" or is_operator(node, DOMAIN, PRESENT):
                    raise _UnlikeError(f"{node.name}, which depends on more than the attention")
                else:
                    for source in node.all_input_nodes:
                        value(source)
                    args, kwargs = map_arg((node.args, node.kwargs), value)
                    try:
                        values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
                    except (RuntimeError, IndexError) as error:  # PyTorch's operators raise these
                        raise _UnlikeError(
                            f"{node.name}, which cannot be run with {tokens} of {total} tokens: "
                            f"{first_line(error)}"
                        ) from error
            return values[node]

        with torch.no_grad():
            return [value(node) for node in wanted]


def recognise(program: ExportedProgram, region: Region, positions: int) -> Computed:
    """What a region computes.

    Args:
        program: The trace.
        region: A region of it.
        positions: Number of positions that the graph is to hold for, M.

    Raises:
        CaptureError: It is not the attention of this file's definition.
    """
    try:
        return _Probe(program, region).computed(positions)
    except _UnlikeError as unlike:
        raise _refuse(region.layer, str(unlike)) from unlike


class _Probe:
    def __init__(self, program: ExportedProgram, region: Region) -> None:
        self.region = region
        self.runner = Runner(program)
        query, key = region.query.meta["val"], region.key.meta["val"]
        self.heads, self.size = int(query.shape[1]), int(query.shape[3])
        self.kv_heads = int(key.shape[1])
        self.value_size = int(region.value.meta["val"].shape[3])
        self.dtype = query.dtype
        if self.heads % self.kv_heads:
            raise _UnlikeError(f"{self.heads} heads of queries over {self.kv_heads} of keys")
        found = [n for n in self._inside(region.output) if n.target in SOFTMAX or n.target is FUSED]
        if len(found) != 1:
            raise _UnlikeError(f"{len(found)} softmaxes")
        self.softmax = found[0]

    def _inside(self, node: Node) -> set[Node]:
        ends = {self.region.key, self.region.value, self.region.query}
        seen, waiting = {node}, [node]
        while waiting:
            sources = [n for n in waiting.pop().all_input_nodes if n not in seen | ends]
            seen.update(sources)
            waiting += sources
        return seen

    def computed(self, positions: int) -> Computed:
        table = self._scores(torch.ones(1, positions, dtype=torch.long), 1)[0, :, 0]
        table = table - table[:, :1]
        generator = torch.Generator().manual_seed(0)
        scale: float | None = None
        for rows, tokens in TRIALS:
            mask = torch.tensor(rows)
            batch, total = mask.shape
            query, key, value = (
                torch.randn(batch, heads, length, size, generator=generator).to(self.dtype)
                for heads, length, size in (
                    (self.heads, tokens, self.size),
                    (self.kv_heads, total, self.size),
                    (self.kv_heads, total, self.value_size),
                )
            )
            position = mask.cumsum(1) - 1
            allowed = (mask[:, None] > 0) & (position[:, None] <= position[:, -tokens:, None])
            alone = self._scores(mask, tokens)
            bias = table[:, position].transpose(0, 1)[:, :, None].expand_as(alone).float()
            valid = (mask[:, -tokens:] > 0)[:, None, :, None]
            seen = allowed[:, None] & valid
            self._check_bias(alone, bias, seen, valid)
            wide = [
                x.repeat_interleave(self.heads // self.kv_heads, 1).float() for x in (key, value)
            ]
            products = query.float() @ wide[0].transpose(2, 3)
            given = {self.region.query: query, self.region.key: key, self.region.value: value}
            if scale is None:
                scale = self._scale(products, mask, tokens, given, alone, seen)
            weights = (products * scale + bias).masked_fill(~allowed[:, None], -torch.inf)
            expected = (weights.softmax(-1) @ wide[1]).transpose(1, 2).flatten(2)
            (found,) = self.runner.run([self.region.output], given, mask, tokens)
            if found.shape != expected.shape:
                raise _UnlikeError(f"an output of shape {tuple(found.shape)}")
            far = (found.float() - expected)[mask[:, -tokens:] > 0].abs().max()
            if not float(far) <= TOLERANCE[self.dtype]:
                raise _UnlikeError(f"an output that differs by {float(far):.1e}")
        assert scale is not None
        bias_HM = table.to(self.dtype) if bool(table.any()) else None
        marks = (self.region.key, self.region.value)
        news = [new for new in (operands(mark)[0] for mark in marks) if new is not None]
        groups = {groups_of(new, LAYOUT, self.runner.run) for new in news}
        shared = groups.pop() if len(groups) == 1 else 1
        return Computed(self.heads, shared, scale, bias_HM)

    def _scores(
        self, mask: Tensor, tokens: int, given: Mapping[Node, Tensor] | None = None
    ) -> Tensor:
        """What the softmax is taken of, [B, H, S, T]; without `given`, of queries that are 0."""
        batch, total = mask.shape
        if given is None:
            shapes = (self.heads, tokens, self.size), (self.kv_heads, total, self.size)
            query, key = (torch.zeros(batch, *shape, dtype=self.dtype) for shape in shapes)
            value = torch.zeros(batch, self.kv_heads, total, self.value_size, dtype=self.dtype)
            given = {self.region.query: query, self.region.key: key, self.region.value: value}
        if self.softmax.target is not FUSED:
            source = self.softmax.args[0]
            assert isinstance(source, Node)
            (scores,) = self.runner.run([source], given, mask, tokens)
        else:
            scores = self._fused_scores(given, mask, tokens)
        each = self.heads * tokens * total
        if scores.numel() not in (each, batch * each):
            raise _UnlikeError(f"scores of shape {tuple(scores.shape)} for {total} tokens")
        return scores.reshape(-1, self.heads, tokens, total).expand(batch, -1, -1, -1).float()

    def _fused_scores(self, given: Mapping[Node, Tensor], mask: Tensor, tokens: int) -> Tensor:
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        arguments = {**dict(zip(names, self.softmax.args, strict=False)), **self.softmax.kwargs}
        nodes = [
            arguments[n] for n in ("query", "key", "attn_mask") if arguments.get(n) is not None
        ]
        if len(nodes) != 3 or arguments.get("is_causal"):
            raise _UnlikeError("scaled_dot_product_attention without a mask")
        query, key, added = self.runner.run(nodes, given, mask, tokens)  # type: ignore[arg-type]
        if added.dtype == torch.bool:
            added = torch.zeros(added.shape).masked_fill(~added, -torch.inf)
        scale: Any = arguments.get("scale") or query.shape[-1] ** -0.5
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        products: Tensor = query.float() @ key.float().transpose(2, 3)
        scores: Tensor = products * scale + added.float()
        return scores

    def _check_bias(self, alone: Tensor, bias: Tensor, seen: Tensor, valid: Tensor) -> None:
        rest = (alone - bias).masked_fill(~seen, torch.nan)
        centre = rest.nanmean(-1, keepdim=True)
        off = (rest - centre).abs().nan_to_num(0.0).max()
        largest = float(bias.abs().max())
        if not float(off) <= TOLERANCE[self.dtype] * (1.0 + largest):
            raise _UnlikeError("scores that do not depend on the position of the key alone")
        hidden = (~seen & valid).expand_as(alone)
        if bool((hidden & (alone > centre + bias - HIDDEN)).any()):
            raise _UnlikeError("a mask that lets later tokens or padding through")

    def _scale(
        self,
        products: Tensor,
        mask: Tensor,
        tokens: int,
        given: Mapping[Node, Tensor],
        alone: Tensor,
        seen: Tensor,
    ) -> float:
        scores = self._scores(mask, tokens, given)
        seen = seen.expand_as(products)
        x, y = products[seen].double(), (scores - alone)[seen].double()
        found, usual = float((x @ y) / (x @ x)), self.size**-0.5
        return usual if abs(found - usual) < usual * TOLERANCE[self.dtype] else found
