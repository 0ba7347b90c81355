"""Tied weights: one parameter under two names, read by an embedding and by a linear layer.

An adapter on such a layer would change the embedding too once it is folded (PEFT does so, and its
logits are wrong).

Before:  %w = get_attr[lm_head.weight]; embedding(%w, ids); linear(%h, %w)
After:   %e = get_attr[model.embed_tokens.weight]; embedding(%e, ids); %w =
get_attr[lm_head.weight]; linear(%h, %w)
"""

from __future__ import annotations

from torch import fx, nn

from bone_fx.dialects import find_sites
from bone_fx.errors import SiteError
from bone_fx.graphs import container
from bone_fx.sites import LinearSite


def untie_weights(gm: fx.GraphModule, sites: list[LinearSite], *, untie: bool) -> None:
    """Untie the weights of `sites` in place, or refuse.

    Raises:
        SiteError: A site's weight is tied and `untie` is False, or it has no other name to be read
            by.
    """
    names_of: dict[int, list[str]] = {}
    for name, parameter in gm.named_parameters(remove_duplicate=False):
        names_of.setdefault(id(parameter), []).append(name)
    search = find_sites(gm)
    for site in sites:
        weight = gm.get_parameter(site.weight_name)
        others = [name for name in names_of[id(weight)] if name != site.weight_name]
        readers = _other_readers(
            gm, site, {use.node for use in search.uses if use.site.name == site.name}
        )
        if not others and not readers:
            continue
        if not untie:
            raise SiteError(
                f"{site.name}: its weight is tied to {', '.join(others) or readers[0].name}",
                expected="a layer with a weight of its own",
                next_step="leave it out with exclude_modules, or pass untie=True",
            )
        called = next((reader for reader in readers if reader.op == "call_module"), None)
        if called is not None:
            raise SiteError(f"{site.name}: its weight is also read by the module {called.target}")
        inseparable = next((r for r in readers if not _reads(r, site.weight_name)), None)
        if inseparable is not None or (readers and not others):
            reader = inseparable or readers[0]
            raise SiteError(
                f"{site.name}: its weight is also read by {reader.name}, under no other name"
            )
        for node in readers:
            with gm.graph.inserting_before(node):
                separate = gm.graph.get_attr(others[0])
            for read in _reads(node, site.weight_name):
                node.replace_input_with(read, separate)
        owner, leaf = container(gm, site.weight_name)
        owner.register_parameter(
            leaf, nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
        )


def _reads(node: fx.Node, name: str) -> list[fx.Node]:
    """The inputs of a node that are a parameter itself, no view of it."""
    return [n for n in node.all_input_nodes if n.op == "get_attr" and str(n.target) == name]


def _other_readers(gm: fx.GraphModule, site: LinearSite, uses: set[fx.Node]) -> list[fx.Node]:
    """What reads a site's weight, or the transposed view of it that a use reads, and is no use."""
    reads = [n for n in gm.graph.nodes if n.op == "get_attr" and str(n.target) == site.weight_name]
    views = {n for use in uses for n in use.all_input_nodes if set(n.all_input_nodes) & set(reads)}
    users = [user for read in [*reads, *views] for user in read.users]
    weight = gm.get_parameter(site.weight_name)
    calls = [n for n in gm.graph.nodes if n.op == "call_module"]
    users += [
        n for n in calls if any(p is weight for p in gm.get_submodule(str(n.target)).parameters())
    ]
    return [user for user in users if user not in uses and user not in views]
