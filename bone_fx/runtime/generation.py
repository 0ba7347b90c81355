"""Text generation with onnxruntime-genai, from the files of a published folder alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bone_fx.errors import ExportError, InputRefusedError, ProviderError, UsageError, first_line
from bone_fx.files.nearby import meant

CONFIG = "genai_config.json"
_TOKENIZER = "tokenizer.json"
_TEMPLATE = "chat_template.jinja"


class Conversation:
    """A decoder that onnxruntime-genai has open.

    Args:
        folder: The folder, with `genai_config.json`.
        variant: Name of one of several graphs; None opens the first.

    Raises:
        UsageError: The folder is no decoder that generates text, or has no such variant.
        ProviderError: onnxruntime-genai, or the provider of the folder, is not here.
        ExportError: onnxruntime-genai does not open the folder.

    Examples:
        ```python
        conversation = Conversation(Path("./out"))
        prompt = conversation.as_prompt("Who are you?")
        print("".join(conversation.generate(prompt, max_new_tokens=32)))
        ```
    """

    def __init__(self, folder: Path, *, variant: str | None = None) -> None:
        self._folder = folder.expanduser()
        self._check(folder, variant)
        genai = _genai()
        try:
            config = genai.Config(str(self._folder))
            if variant is not None:
                overlay = {"model": {"decoder": {"filename": f"{variant}.onnx"}}}
                config.overlay(json.dumps(overlay))
            self._model = genai.Model(config)
            self._tokenizer = genai.Tokenizer(self._model)
        except Exception as error:
            raise self._not_opened(error) from error
        self._genai = genai

    def as_prompt(self, text: str, *, plain: bool = False) -> str:
        """What the model reads where a user says a text: the chat template's words around it.

        Args:
            text: What the user says.
            plain: Leave the template out. A folder without one has none to apply.

        Raises:
            InputRefusedError: onnxruntime-genai cannot apply the template.
        """
        if plain or not self._has_template():
            return text
        messages = json.dumps([{"role": "user", "content": text}])
        try:
            return str(self._tokenizer.apply_chat_template(messages, add_generation_prompt=True))
        except Exception as error:
            raise InputRefusedError(
                f"onnxruntime-genai cannot apply the chat template of {self._folder}",
                found=first_line(error),
                next_step="--plain passes the prompt as it is",
            ) from error

    def generate(self, prompt: str, max_new_tokens: int) -> Iterator[str]:
        """The text that follows a prompt, piece by piece as it is generated.

        Sampling, penalties and end tokens are those of `genai_config.json`.

        Args:
            prompt: What the model reads.
            max_new_tokens: Tokens at most, within the model's context.

        Raises:
            InputRefusedError: The prompt leaves no room for an answer, or holds no token.
        """
        tokens = self._tokenizer.encode(prompt)
        context = json.loads((self._folder / CONFIG).read_text("utf-8"))["model"]["context_length"]
        if not 0 < len(tokens) < context:
            raise InputRefusedError(
                f"a prompt of {len(tokens)} tokens cannot be answered",
                expected=f"1 to {context - 1} tokens, as the model's context has {context}",
                next_step="pass another prompt",
            )
        parameters = self._genai.GeneratorParams(self._model)
        parameters.set_search_options(max_length=min(len(tokens) + max_new_tokens, context))
        generator = self._genai.Generator(self._model, parameters)
        generator.append_tokens(tokens)
        stream = self._tokenizer.create_stream()
        while not generator.is_done():
            generator.generate_next_token()
            yield str(stream.decode(generator.get_next_tokens()[0]))

    def _check(self, given: Path, variant: str | None) -> None:
        for name in (CONFIG, _TOKENIZER):
            if not (self._folder / name).is_file():
                raise UsageError(
                    f"{given} is no decoder that generates text",
                    expected=f"a folder with {CONFIG} and {_TOKENIZER}",
                    found=f"no {name}" if self._folder.is_dir() else "no such folder",
                    next_step=meant(given, "give the output of an export of a decoder"),
                )
        if variant is not None and not (self._folder / f"{variant}.onnx").is_file():
            graphs = sorted(path.stem for path in self._folder.glob("*.onnx"))
            raise UsageError(
                f"{given} has no variant {variant}",
                expected=" or ".join(graphs),
                next_step="choose one of these",
            )

    def _has_template(self) -> bool:
        if (self._folder / _TEMPLATE).is_file():
            return True
        path = self._folder / "tokenizer_config.json"
        return path.is_file() and bool(json.loads(path.read_text("utf-8")).get("chat_template"))

    def _not_opened(self, error: Exception) -> ProviderError | ExportError:
        content = json.loads((self._folder / CONFIG).read_text(encoding="utf-8"))
        providers = content["model"]["decoder"]["session_options"]["provider_options"]
        if any("cuda" in provider for provider in providers):
            return ProviderError(
                f"onnxruntime-genai does not run {self._folder} on CUDA here",
                found=first_line(error),
                next_step="install bone_fx[gpu,genai] on a machine with a GPU, "
                "or export with --provider cpu",
            )
        return ExportError(
            f"onnxruntime-genai does not open {self._folder}",
            found=first_line(error),
            next_step=f"bone-export verify {self._folder}",
        )


def _genai() -> Any:
    """The module of onnxruntime-genai.

    Raises:
        ProviderError: It is not installed, or does not load.
    """
    try:
        import onnxruntime_genai
    except ImportError as error:
        raise ProviderError(
            "onnxruntime-genai is not here, which generates the text",
            found=first_line(error),
            next_step="pip install 'bone_fx[genai]'; bone-export doctor says what else is wrong",
        ) from error
    return onnxruntime_genai
