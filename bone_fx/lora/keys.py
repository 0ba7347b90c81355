"""Names of tensors in a LoRA's file, as PEFT and trainers that use it write them.

PEFT writes `base_model.model.<layer>.lora_A.weight`. Others leave the prefix out or write it twice,
keep the wrappers of DDP, FSDP and torch.compile in the path, or the adapter's name before the end.
"""

from __future__ import annotations

from dataclasses import dataclass

LEAVES = (
    *("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"),
    "trainable_tokens_delta",
)
"""Names that PEFT gives to what it trains in a layer."""
_PREFIXES = ("base_model.model.", "module.")
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_ENDS = ("weight", "bias")


@dataclass(frozen=True)
class Key:
    """What a name says.

    Attributes:
        site: Name of the layer in PEFT's model.
        leaf: One of `LEAVES`.
        end: `"weight"` or `"bias"`, or nothing where a parameter has the leaf's name.
        adapter: Name of the adapter; empty as PEFT writes it.
    """

    site: str
    leaf: str
    end: str
    adapter: str


def plain(name: str) -> str:
    """A name without prefixes and wrappers."""
    name = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    while prefix := next((p for p in _PREFIXES if name.startswith(p)), ""):
        name = name.removeprefix(prefix)
    return name


def read_key(name: str) -> Key | None:
    """What a plain name says; None if it is no part of a LoRA."""
    parts = name.split(".")
    place = next((i for i, part in enumerate(parts) if part in LEAVES), 0)
    if not place:
        return None
    rest = parts[place + 1 :]
    end = rest.pop() if rest and rest[-1] in _ENDS else ""
    if len(rest) > 1:
        return None
    return Key(".".join(parts[:place]), parts[place], end, "".join(rest))
