"""Values of a GGUF file that decide what its model computes, and that transformers does not read.

transformers has a table by architecture of the values that become fields of its configuration, and
drops the others without a word: the scaling of rotary positions, windows, caps and scales. What is
dropped is harmless if tensors have it in their shapes, if it says "none", or if the configuration
says the same by default.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

_IN_SHAPES = re.compile(
    r"(^|[._])(vocab_size|length(_mla|_swa|_out|_per_layer_input)?|block_count|head_count(_kv)?|"
    r"expert(_used|_shared)?_count|lora_rank|inner_size|state_size|time_step_rank|conv_kernel|"
    r"group_count|l_cache|relative_buckets_count|features_length)$"
)
"""What a tensor of another shape would contradict, and the length of the context."""
_OF_NO_GRAPH = re.compile(
    r"(tensor_data_layout|pooling_type|decoder_start_token_id|output_labels|finetuned)$"
)
_NAMES = (
    ("epsilon", "eps"),
    ("freq_base", "theta"),
    ("softcapping", "softcapping"),
    ("sliding_window", "sliding_window"),
    ("scaling.type", "rope_type"),
    ("scaling.factor", "factor"),
    ("logit_scale", "logit_scale"),
    ("use_parallel_residual", "use_parallel_residual"),
    ("expert_weights_norm", "norm_topk_prob"),
)
"""Part of a value's name, and part of the name of the field that means the same."""
_SCALE = re.compile(r"scale|factor|multiplier|alpha")
"""Values of which 1 says "none"; of the others 0 does."""


def unread_values(values: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """Names of the values that transformers dropped and that change what is computed.

    Args:
        values: Numbers and texts of a GGUF file by name.
        config: The configuration that transformers made of them.
    """
    architecture = str(values.get("general.architecture"))
    read = _fields_read(architecture)
    fields = list(_leaves(config, ""))
    return [
        name
        for name, value in values.items()
        if name.startswith(f"{architecture}.")
        for key in [name.removeprefix(f"{architecture}.")]
        if read.get(key) is None and not _is_harmless(key, value, values, config, fields)
    ]


def lacks_epsilon(values: Mapping[str, Any]) -> bool:
    """Whether a file says nothing of its norms, of which no default is right for all models."""
    return not any(name.endswith("epsilon") for name in values)


def _fields_read(architecture: str) -> Mapping[str, str | None]:
    """Field of the configuration by the name of a value, as transformers has it."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_TO_TRANSFORMERS_MAPPING

    tables: Any = GGUF_TO_TRANSFORMERS_MAPPING["config"]
    plain = re.sub(r"[-_]|encoder$", "", architecture)
    return next((table for name, table in tables.items() if name.replace("_", "") == plain), {})


def _is_harmless(
    key: str,
    value: Any,
    values: Mapping[str, Any],
    config: Mapping[str, Any],
    fields: list[tuple[str, Any]],
) -> bool:
    if _IN_SHAPES.search(key) or _OF_NO_GRAPH.search(key):
        return True
    if key == "rope.dimension_count":
        return bool(value == _rotated(config))
    if key == "attention.causal":
        return bool(value)
    if value in (0, "", "none") or (_SCALE.search(key) and value == 1):
        return True
    if key.startswith("rope.scaling.") and key != "rope.scaling.type":
        kind = values.get(f"{values['general.architecture']}.rope.scaling.type", "linear")
        factor = values.get(f"{values['general.architecture']}.rope.scaling.factor", 1.0)
        if kind == "none" or (kind == "linear" and factor in (0, 1)):
            return True
    if key == "rope.scaling.type" and value == "linear":
        return values.get(f"{values['general.architecture']}.rope.scaling.factor", 1.0) in (0, 1)
    return any(
        part in key and means in name and _equal(value, other)
        for part, means in _NAMES
        for name, other in fields
    )


def _rotated(config: Mapping[str, Any]) -> int | None:
    """How many of a head's values a configuration's rotary positions turn."""
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    size = config.get("head_dim") or (width // heads if heads and width else None)
    shares = [other for name, other in _leaves(config, "") if "partial_rotary_factor" in name]
    return None if size is None else int(size * next(iter(shares), 1.0))


def _equal(value: Any, other: Any) -> bool:
    if isinstance(value, int | float) and isinstance(other, int | float):
        return math.isclose(value, other, rel_tol=1e-5)
    return bool(value == other)


def _leaves(content: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(content, Mapping):
        for key, value in content.items():
            yield from _leaves(value, f"{name}.{key}" if name else str(key))
    else:
        yield name, content
