"""What stands beside a decoder graph: `genai_config.json`, the tokenizer, and that both run.

The graph may be right and its folder wrong: a size, a name, an end token, another tokenizer. The
values are compared with the graph and with what transformers reads from the base and the adapters;
onnxruntime-genai, where it is installed, opens the folder and generates the graph's own tokens.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, GenerationConfig

from bone_fx.errors import LOOK, InputRefusedError, VerificationError, first_line
from bone_fx.verify.decoder.routes import Choices
from bone_fx.verify.decoder.running import generate
from bone_fx.verify.graph import WrittenGraph
from bone_fx.verify.parity import Parity

CONFIG = "genai_config.json"
GENERATION = "generation_config.json"
TOKENIZER = "tokenizer.json"
_DEFAULT_CONTEXT = 2048
_TOKENS = 8
_TOKEN_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_PROMPT = 5
_MARGIN = 1e-3
"""Of the largest logit: two tokens that lie closer may change places in a cache of fixed size."""
_TEXT = "The quick brown fox: 3.14 jumps <|over|>\n\tthe lazy dög, 狗."


def verify_genai_folder(
    parity: Parity,
    graph: WrittenGraph,
    config: Any,
    base: Path,
    adapters: Sequence[Path],
    load: Callable[[Path], Any],
    *,
    opened: str | None = None,
) -> None:
    """Compare `genai_config.json` and the tokenizer with the graph and with their sources.

    Args:
        parity: Takes the names of the checks.
        graph: The graph in its folder.
        config: The reference's configuration.
        base: The base's folder.
        adapters: The adapters' folders, in the order in which they apply.
        load: Gives the tokenizer of a folder, as `load_tokenizer` does.
        opened: Name of the graph that the file opens; None for this one.

    Raises:
        InputRefusedError: The tokenizer of an input cannot be loaded.
        VerificationError: A field or the tokenizer is wrong; the message names file and field.
    """
    folder = graph.path.parent
    content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    found = _flat(content["model"])
    of_graph = _of_graph(graph)
    tokens = _special_tokens(config, base, adapters, of_graph["vocab_size"], load)
    expected = {**of_graph, **_of_config(config), **tokens}
    expected["filename"] = opened or expected["filename"]
    for field, value in expected.items():
        _check(field, found.get(field), value)
    context = found["context_length"]
    if content["search"]["max_length"] > context:
        _check("search.max_length", content["search"]["max_length"], f"at most {context}")
    shares = "search.past_present_share_buffer"
    _check(shares, content["search"]["past_present_share_buffer"], graph.shares_a_buffer())
    for options in found["session_options"]["provider_options"]:
        if options.get("cuda", {}).get("enable_cuda_graph") == "1" and not graph.shares_a_buffer():
            _check("enable_cuda_graph", "1", "0, as the cache grows from step to step")
    parity.cases.append(f"{CONFIG}: {len(expected) + 1} fields")
    _verify_generation_settings(parity, folder, config, tokens)
    _verify_tokenizer(parity, folder, [*reversed(adapters), base], found["vocab_size"], load)


def verify_generation(parity: Parity, graph: WrittenGraph) -> None:
    """Generate greedily with onnxruntime-genai; the tokens are those of the graph itself.

    Args:
        parity: Takes the name of the check; the graph is run where it did not generate before.
        graph: The graph in its folder.

    Raises:
        VerificationError: genai does not open the folder, or generates other tokens.
    """
    if importlib.util.find_spec("onnxruntime_genai") is None:
        parity.skip("onnxruntime-genai", "it is not installed")
        return
    content = json.loads((graph.path.parent / CONFIG).read_text(encoding="utf-8"))
    padding = content["model"].get("pad_token_id")
    of_graph = parity.generated
    if of_graph is None or padding in of_graph.prompt:  # which genai masks wherever it stands
        vocab_size = _of_graph(graph)["vocab_size"]
        prompt = np.random.default_rng(0).integers(0, vocab_size, _PROMPT).tolist()
        prompt = [token for token in prompt if token != padding]
        without_experts = Choices({}, {}, last_of_equals=True)
        of_graph = generate(graph.session(), without_experts, prompt, _TOKENS)
    expected = of_graph.tokens
    try:
        tokens = _generated(graph.path, of_graph.prompt, len(expected))
    except Exception as error:
        raise VerificationError(
            "verification failed: onnxruntime-genai does not run the folder",
            expected="the tokens of the graph",
            found=first_line(error),
            next_step=f"{LOOK}; look at its {CONFIG}",
        ) from error
    ends = _as_list(content["model"].get("eos_token_id", 0))  # 0 is what genai takes without one
    place = _first_difference(tokens, expected, ends)
    if place is not None and of_graph.margins[place] > _MARGIN:
        raise VerificationError(
            "verification failed: onnxruntime-genai generates other tokens than the graph",
            expected=expected,
            found=tokens,
            next_step=f"{LOOK}; look at its {CONFIG}",
        )
    parity.cases.append(f"onnxruntime-genai: {len(tokens)} tokens")


def _verify_generation_settings(
    parity: Parity, folder: Path, config: Any, tokens: Mapping[str, Any]
) -> None:
    """`generation_config.json` opens in transformers and ends texts with the same tokens."""
    if not (folder / GENERATION).is_file():
        parity.skip(GENERATION, "the folder has none: an earlier version wrote it")
        return
    settings = _generation(folder)
    ends = settings.get("eos_token_id")
    ends = _as_list(config.get_text_config().eos_token_id if ends is None else ends)
    expected = _as_list(tokens["eos_token_id"])
    if not set(expected) <= set(ends):
        raise VerificationError(
            f"verification failed: {GENERATION}: eos_token_id",
            expected=expected,
            found=ends,
            next_step=LOOK,
        )
    parity.cases.append(f"{GENERATION}: end tokens")


def _first_difference(
    tokens: Sequence[int], expected: Sequence[int], ends: Collection[int]
) -> int | None:
    """Where two generations differ first, of which the second goes on after an end token.

    onnxruntime-genai leaves the end token out of what it generated, or has it last.
    """
    for place, other in enumerate(expected):
        if place == len(tokens):
            has_ended = other in ends or (place > 0 and expected[place - 1] in ends)
            return None if has_ended else place
        if tokens[place] != other:
            return place
    return None


def _flat(content: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `model`, with those of `decoder` among them."""
    return {**content, **content["decoder"]}


def _check(field: str, found: object, expected: object) -> None:
    if found != expected:
        raise VerificationError(
            f"verification failed: {CONFIG}: {field}",
            expected=expected,
            found=found,
            next_step=LOOK,
        )


def _of_graph(graph: WrittenGraph) -> dict[str, Any]:
    """What the graph itself says: names, heads, layers, vocabulary."""
    proto = graph.read().graph
    inputs = {value.name: value for value in proto.input}
    keys = [
        name for name in inputs if name.startswith("past_key_values.") and name.endswith(".key")
    ]
    dims = inputs[keys[0]].type.tensor_type.shape.dim
    logits = next(value for value in proto.output if value.name == "logits")
    return {
        "filename": graph.path.name,
        "num_hidden_layers": len(keys),
        "num_key_value_heads": dims[1].dim_value,
        "head_size": dims[3].dim_value,
        "vocab_size": logits.type.tensor_type.shape.dim[2].dim_value,
        "inputs": {
            name: name if name in inputs else None for name in ("input_ids", "attention_mask")
        }
        | {
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }


def _of_config(config: Any) -> dict[str, Any]:
    """What the model's configuration says: sizes and context."""
    text = config.get_text_config()
    return {
        "type": "decoder",
        "hidden_size": int(text.hidden_size),
        "num_attention_heads": int(text.num_attention_heads),
        "context_length": int(getattr(text, "max_position_embeddings", None) or _DEFAULT_CONTEXT),
    }


def _special_tokens(
    config: Any,
    base: Path,
    adapters: Sequence[Path],
    vocab_size: int,
    load: Callable[[Path], Any],
) -> dict[str, Any]:
    """Begin, end and padding of texts.

    An adapter's generation settings win over the base's, and where it has none, its tokenizer does
    if that ends or begins texts otherwise than the base's.
    """
    folders = [*reversed(adapters), base]
    with_settings = next((f for f in folders if (f / GENERATION).is_file()), None)
    settings = {} if with_settings is None else _generation(with_settings)
    trained_with = next((f for f in adapters[::-1] if (f / TOKENIZER).is_file()), None)
    own = None if trained_with is None else load(trained_with)
    of_base = load(base) if own is not None and (base / TOKENIZER).is_file() else None
    tokens: dict[str, Any] = {}
    for field in _TOKEN_FIELDS:
        token = settings.get(field)
        if token is None:
            token = getattr(config.get_text_config(), field, None)
        trained = getattr(own, field, None)
        is_told = with_settings in adapters and settings.get(field) is not None
        if trained is not None and trained != getattr(of_base, field, None) and not is_told:
            token = token if trained in _as_list(token) else trained
        numbers = [n for n in _as_list(token) if 0 <= n < vocab_size]
        tokens[field] = numbers[0] if len(numbers) == 1 else numbers or None
    if tokens["pad_token_id"] is None:
        tokens["pad_token_id"] = next(iter(_as_list(tokens["eos_token_id"])), None)
    return tokens


def _generation(folder: Path) -> dict[str, Any]:
    return dict(GenerationConfig.from_pretrained(folder, local_files_only=True).to_dict())


def _as_list(token: Any) -> list[int]:
    return list(token) if isinstance(token, list) else [] if token is None else [token]


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder, as transformers loads it.

    Raises:
        InputRefusedError: It cannot be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise InputRefusedError(
            f"transformers does not load the tokenizer of {folder}",
            found=f"{type(error).__name__}: {error}",
            next_step="save the tokenizer again, or take its files out of the folder",
        ) from error


def _verify_tokenizer(
    parity: Parity,
    folder: Path,
    sources: Sequence[Path],
    vocab_size: int,
    load: Callable[[Path], Any],
) -> None:
    """The folder's tokenizer is that of the first source that has one, and fits the vocabulary."""
    source = next((s for s in sources if (s / TOKENIZER).is_file()), None)
    if source is None or not (folder / TOKENIZER).is_file():
        parity.skip("tokenizer", "there is none in tokenizer.json")
        return
    expected = load(source)
    try:
        actual = load(folder)
    except Exception as error:
        raise VerificationError(
            f"verification failed: {TOKENIZER}: transformers does not load it",
            found=f"{type(error).__name__}: {error}",
            next_step=LOOK,
        ) from error
    ids, of_source = actual(_TEXT)["input_ids"], expected(_TEXT)["input_ids"]
    contents = [(f / TOKENIZER).read_bytes() for f in (folder, source)]
    if ids != of_source or (
        contents[0] != contents[1] and json.loads(contents[0]) != json.loads(contents[1])
    ):
        raise VerificationError(
            f"verification failed: {TOKENIZER}: another tokenizer than that of {source.name}",
            expected=of_source,
            found=ids,
            next_step=LOOK,
        )
    if max(ids, default=0) >= vocab_size:
        raise VerificationError(
            f"verification failed: {TOKENIZER}: it gives ids that the model has not",
            expected=f"below {vocab_size}",
            found=max(ids),
            next_step=LOOK,
        )
    _verify_template(actual, [load(s) for s in sources if (s / TOKENIZER).is_file()])
    parity.cases.append(f"{TOKENIZER}: {len(actual)} tokens")


def _verify_template(tokenizer: Any, sources: Sequence[Any]) -> None:
    """The chat template is that of the first source that has one."""
    templates = [source.chat_template for source in sources if source.chat_template]
    if templates and isinstance(templates[0], str) and tokenizer.chat_template != templates[0]:
        raise VerificationError(
            "verification failed: the chat template is another than its source's",
            expected=templates[0][:80],
            found=str(tokenizer.chat_template)[:80],
            next_step=LOOK,
        )


def _generated(graph: Path, prompt: list[int], count: int) -> list[int]:
    """Tokens that onnxruntime-genai generates with a graph on the CPU until it is done."""
    import onnxruntime_genai as og

    config = og.Config(str(graph.parent))
    config.clear_providers()
    config.overlay(json.dumps({"model": {"decoder": {"filename": graph.name}}}))
    model = og.Model(config)
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + count, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array([prompt], dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)][len(prompt) :]
