"""The contract of a pass, and the frame that catches an author who breaks it.

A pass is a function from a `GraphModule` to a `PassResult`. It leaves its input as it was, says
honestly whether it changed anything, and says what it refused. The frame lints the result,
recompiles it, and names the pass and those that ran before it in any error.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Concatenate, ParamSpec, cast

import torch
from torch import fx, nn

from bone_fx.errors import BoneFxError, PassError, first_line
from bone_fx.sites import LinearSite, Refusal

log = logging.getLogger(__name__)
HISTORY = "bone_fx_passes"
"""Key of `GraphModule.meta` with the names of the passes that ran, in order."""

P = ParamSpec("P")


@dataclass
class _Chain:
    """Passes that run one after another: `made` is what the last one made, and nobody else has."""

    made: fx.GraphModule | None = None


_CHAIN: ContextVar[_Chain | None] = ContextVar("_CHAIN", default=None)


@dataclass(frozen=True)
class PassResult:
    """What a pass gives back.

    Attributes:
        graph_module: The graph after the pass; the pass's input is left as it was.
        modified: True only if something changed.
        applied: The sites that the pass changed, in graph order.
        refused: What was asked for and not done, each with its reason.
    """

    graph_module: fx.GraphModule
    modified: bool
    applied: tuple[LinearSite, ...] = ()
    refused: tuple[Refusal, ...] = field(default=())


def graph_pass(
    run: Callable[Concatenate[fx.GraphModule, P], PassResult],
) -> Callable[Concatenate[fx.GraphModule, P], PassResult]:
    """Hold a pass to its contract.

    Raises:
        PassError: The pass edited its input, gave an invalid graph, or was wrong about `modified`.
    """
    name = run.__name__

    @functools.wraps(run)
    def framed(gm: fx.GraphModule, /, *args: P.args, **kwargs: P.kwargs) -> PassResult:
        history = [*gm.meta.get(HISTORY, [])]
        chain = _CHAIN.get()
        kept = chain is None or chain.made is not gm
        if not kept:
            gm.graph.eliminate_dead_code()  # as every pass does, also one that changes nothing
        before = _nodes(gm)
        try:
            result = run(gm, *args, **kwargs)
            if result.graph_module is not gm:
                result.graph_module.graph.lint()
        except BoneFxError:
            raise
        except Exception as error:
            raise PassError(
                f"pass {name} failed: {first_line(error)}",
                found=f"passes before it: {history or 'none'}",
            ) from error
        after = _nodes(result.graph_module)
        if kept and (after if result.graph_module is gm else _nodes(gm)) != before:
            raise PassError(
                f"pass {name} edited the graph it was given", found=f"passes before it: {history}"
            )
        if result.modified != (after != before):
            raise PassError(f"pass {name} answered modified={result.modified}, which is not so")
        if chain is None:
            result.graph_module.recompile()
        elif result.graph_module is not gm:
            chain.made = result.graph_module
        result.graph_module.meta[HISTORY] = [*history, name]
        if log.isEnabledFor(logging.DEBUG):
            log.debug("pass %s: %s", name, op_difference(gm, result.graph_module))
        return result

    return framed


@contextmanager
def one_after_another() -> Iterator[None]:
    """While open, a pass works on what the pass before it made, and the caller compiles at the end.

    Copying and compiling the graph once a pass is half of the time of the passes. The graph that
    the first one is given is left as it was.
    """
    token = _CHAIN.set(_Chain())
    try:
        yield
    finally:
        _CHAIN.reset(token)


def op_difference(before: fx.GraphModule, after: fx.GraphModule) -> str:
    """How many nodes of each target came and went, such as `+14 bone_fx.adapted_linear.default`."""
    counts = Counter(str(n.target) for n in after.graph.nodes if n.op.startswith("call"))
    counts.subtract(str(n.target) for n in before.graph.nodes if n.op.startswith("call"))
    return (
        " ".join(f"{number:+d} {target}" for target, number in sorted(counts.items()) if number)
        or "no difference"
    )


def copy_module(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy to work on: its own graph, module tree and `Parameter` objects over the same storage.

    Every parameter and buffer keeps its name, tied names stay tied, persistence and parameters that
    the graph does not read are kept. Submodules that the graph calls are copied over
    the same storage too. Between passes that run `one_after_another` it is the module itself.
    """
    chain = _CHAIN.get()
    if chain is not None and chain.made is gm:
        return gm
    root = nn.Module()
    for name, _ in gm.named_modules(remove_duplicate=False):
        container(root, f"{name}.state" if name else "state")
    memo: dict[int, Any] = {}
    for name, parameter in gm.named_parameters(remove_duplicate=False):
        if id(parameter) not in memo:
            memo[id(parameter)] = nn.Parameter(
                parameter.detach(), requires_grad=parameter.requires_grad
            )
        owner, leaf = container(root, name)
        owner.register_parameter(leaf, memo[id(parameter)])
    for prefix, module in gm.named_modules(remove_duplicate=False):
        for leaf, buffer in module._buffers.items():
            lasting = leaf not in module._non_persistent_buffers_set
            if lasting and buffer is not None:  # statistics that a training forward writes
                memo.setdefault(id(buffer), buffer.clone())
            buffer = memo.setdefault(id(buffer), buffer)
            owner, _ = container(root, f"{prefix}.{leaf}" if prefix else leaf)
            owner.register_buffer(leaf, buffer, persistent=lasting)
    graph = copy_graph(gm.graph)
    for node in graph.nodes:
        target = str(node.target)
        if node.op == "call_module" or (node.op == "get_attr" and _is_module(gm, target)):
            owner, leaf = container(root, target)
            setattr(owner, leaf, copy.deepcopy(gm.get_submodule(target), memo))
        elif node.op == "get_attr":
            _copy_plain_attribute(gm, root, target)
    # With an empty graph first: each assignment of a graph compiles it, and the frame does that.
    copied = fx.GraphModule(root, fx.Graph(), type(gm).__name__)
    copied._graph, graph.owning_module = graph, copied
    adopt_state(copied, root)
    copied.meta.update(gm.meta)
    copied.train(gm.training) if type(gm).train is nn.Module.train else None
    return copied


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy of a graph with its node names, meta and code generator."""
    copied = fx.Graph(tracer_cls=graph._tracer_cls)
    value, old = cast(
        "tuple[Any, fx.Node]", copied.graph_copy(graph, val_map={}, return_output_node=True)
    )
    copied.output(value, type_expr=getattr(old, "type", None)).meta.update(old.meta)
    copied._codegen = graph._codegen
    return copied


def erase_unread(graph: fx.Graph, node: fx.Node) -> None:
    """Erase a node that nobody reads, and what nobody reads then, random draws included."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if node.users or node._erased or node.op in ("placeholder", "output"):
            continue
        waiting += node.all_input_nodes
        graph.erase_node(node)


def container(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that owns a dotted name and the leaf name.

    Plain containers are made where there are none.
    """
    *path, leaf = name.split(".")
    for part in path:
        child = getattr(root, part, None)
        if not isinstance(child, nn.Module):
            child = nn.Module()
            root.add_module(part, child)
        root = child
    return root, leaf


def adopt_state(module: nn.Module, root: nn.Module) -> None:
    """Make a module tree the module's own, in place of the one it has."""
    for table in ("_modules", "_parameters", "_buffers"):
        setattr(module, table, getattr(root, table))
    module._non_persistent_buffers_set = root._non_persistent_buffers_set


def _copy_plain_attribute(gm: fx.GraphModule, root: nn.Module, name: str) -> None:
    value: object = gm
    for part in name.split("."):
        value = getattr(value, part)
    owner, leaf = container(root, name)
    if not hasattr(owner, leaf):
        setattr(owner, leaf, value)


def _is_module(gm: fx.GraphModule, name: str) -> bool:
    try:
        gm.get_submodule(name)
    except AttributeError:
        return False
    return True


def _nodes(gm: fx.GraphModule) -> list[tuple[str, str, str, str, str]]:
    return [(n.op, n.name, str(n.target), str(n.args), str(n.kwargs)) for n in gm.graph.nodes]


def fake_like(node: fx.Node, tensor: torch.Tensor) -> object | None:
    """A fake value for `meta["val"]` of a new constant, in the mode of a node that has one.

    None if the trace has none.
    """
    mode = getattr(node.meta.get("val"), "fake_mode", None)
    return None if mode is None else mode.from_tensor(tensor, static_shapes=True)


def attribute_at(root: Any, target: str) -> Any:
    """What a dotted name leads to, such as the tensor that a `get_attr` node reads."""
    for part in target.split("."):
        root = getattr(root, part)
    return root
