"""Runs of `bone-export` for a campaign: forked from a process with its imports done, or real ones.

A forked run is the whole process of the command line, signals and exit included, without the
seconds that a process needs to import PyTorch.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXIT_CODES = {0, 2, 3, 4, 5, 6, 7}
"""What a run may end with that nobody stopped; 70 is a fault."""
_ROOT = Path(__file__).resolve().parent.parent
_MORE_MEMORY = 4 << 30
"""Bytes of address space that a forked run may take beyond what it was forked with."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        code: Exit status; negative for a signal that ended the process.
        seconds: How long it took.
        memory: Largest resident set, in bytes.
        out: What it printed on stdout.
        err: What it printed on stderr.
        hung: Whether it had to be killed.
    """

    code: int
    seconds: float
    memory: int
    out: str
    err: str
    hung: bool


_PATIENCE = 5
"""Seconds by the clock for each of a run's own that count as no end."""
_SLOW = 55
"""Seconds after which a forked run writes where it stands."""


class Run:
    """A run that has begun."""

    def __init__(
        self,
        arguments: Sequence[str],
        folder: Path,
        *,
        real: bool,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Begin a run.

        Args:
            arguments: Of `bone-export`.
            folder: Where it runs; `out` and `err` beside it get what it prints.
            real: Whether it is a process of its own.
            environment: Variables to set.
        """
        self._out, self._err = (folder.with_name(f"{folder.name}.{n}") for n in ("out", "err"))
        self._start = time.monotonic()
        changes = {"TMPDIR": str(folder), **(environment or {})}
        if real:
            with self._out.open("wb") as out, self._err.open("wb") as err:
                process = subprocess.Popen(
                    [sys.executable, "-m", "bone_fx", *arguments],
                    cwd=folder,
                    stdout=out,
                    stderr=err,
                    stdin=subprocess.DEVNULL,
                    env={**os.environ, "PYTHONPATH": str(_ROOT), **changes},
                    preexec_fn=_default_signals,
                )
            process.returncode = 0  # it is waited for below
            self.pid = process.pid
        else:
            self.pid = os.fork()
            if self.pid == 0:
                self._become(arguments, folder, changes)

    def _become(self, arguments: Sequence[str], folder: Path, changes: Mapping[str, str]) -> None:
        """In the forked process: be `bone-export`."""
        try:
            _default_signals()
            os.chdir(folder)
            os.environ.update(changes)
            for path, descriptor in ((os.devnull, 0), (self._out, 1), (self._err, 2)):
                flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC if descriptor else os.O_RDONLY
                os.dup2(os.open(path, flags, 0o666), descriptor)
            sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + _MORE_MEMORY, used + _MORE_MEMORY))
            import faulthandler
            import tempfile

            faulthandler.dump_traceback_later(_SLOW, file=sys.stderr)
            tempfile.tempdir = None
            sys.argv = ["bone-export", *arguments]
            from bone_fx.cli import program

            program()
        finally:
            os._exit(99)  # `program` does not come back

    def send(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def wait(self, limit: float) -> Outcome:
        """Wait for the end, or kill it after so many seconds of its own, or five times as many.

        Its own seconds are those of the processor: other work on the machine is no hang.
        """
        hung = False
        while True:
            pid, status, usage = os.wait4(self.pid, os.WNOHANG)
            if pid:
                break
            late = time.monotonic() - self._start > _PATIENCE * limit
            if not hung and (late or _processor_seconds(self.pid) > limit):
                hung = True
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.005)
        out, err = (path.read_bytes().decode("utf-8", "replace") for path in (self._out, self._err))
        code = os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - self._start
        return Outcome(code, seconds, usage.ru_maxrss * 1024, out, err, hung)


def _processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _default_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def tree(folder: Path) -> dict[str, str]:
    """Every entry below a folder by name: kind and content. Pipes and devices are not opened."""
    entries = {}
    for place, folders, files in os.walk(os.fsencode(folder)):
        for name in [*folders, *files]:
            path = os.path.join(place, name)
            mode = os.lstat(path).st_mode
            if stat.S_ISLNK(mode):
                content = os.fsdecode(os.readlink(path))
            elif stat.S_ISREG(mode):
                with open(path, "rb") as file:
                    content = hashlib.sha256(file.read()).hexdigest()
            else:
                content = oct(stat.S_IFMT(mode))
            entries[os.fsdecode(os.path.relpath(path, os.fsencode(folder)))] = content
    return entries


def import_everything() -> None:
    """What a run imports, so that a forked one need not, as quiet as in the command."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    import bone_fx.cli.failures
    import bone_fx.cli.run
    import bone_fx.deploy.builds
    import bone_fx.deploy.export
    import bone_fx.deploy.fold_checkpoint
    import bone_fx.deploy.genai_config
    import bone_fx.deploy.manifest
    import bone_fx.onnx.writer
    import bone_fx.runtime.session
    import bone_fx.verify.decoder.compare_decoder  # noqa: F401


def make_inputs(folder: Path) -> None:
    """A tiny Llama as safetensors and GGUF, a GPT-2, a Bert, and a Bone and a LoRA for each."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models
    from transformers import (
        BertConfig,
        BertModel,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

    folder.mkdir()
    _make_gguf(folder / "base.gguf")
    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3}
    llama = LlamaForCausalLM(
        LlamaConfig(
            **shape,
            hidden_size=48,
            intermediate_size=80,
            max_position_embeddings=64,
            initializer_range=0.2,
            tie_word_embeddings=False,
        )
    )
    gpt2 = GPT2LMHeadModel(
        GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    )
    bert = BertModel(
        BertConfig(**shape, hidden_size=48, intermediate_size=80, max_position_embeddings=64)
    )
    numbers = Tokenizer(models.WordLevel({str(i): i for i in range(96)}, unk_token="0"))
    make: Any = PreTrainedTokenizerFast
    tokenizer = make(tokenizer_object=numbers, eos_token="2", pad_token="3")
    targets = {
        "llama": ("q_proj", "up_proj"),
        "sharded": ("q_proj", "up_proj"),
        "gpt2": ("c_attn",),
        "bert": ("query", "value"),
    }
    for name, model in (("llama", llama), ("sharded", llama), ("gpt2", gpt2), ("bert", bert)):
        base = folder / name
        model.save_pretrained(base, max_shard_size="40KB" if name == "sharded" else "5GB")
        tokenizer.save_pretrained(base)
        blocks = {}
        for site, layer in model.named_modules():
            if site.rpartition(".")[2] in targets[name] and hasattr(layer, "weight"):
                o = layer.weight.shape[0 if isinstance(layer, torch.nn.Linear) else 1]
                blocks[f"base_model.model.{site}.bone_block"] = 0.05 * torch.randn(8, o)
        adapter = folder / f"{name}-adapter"
        adapter.mkdir()
        save_file(blocks, adapter / "adapter_model.safetensors", {"format": "pt"})
        config = {
            "peft_type": "BONE",
            "r": 8,
            "target_modules": list(targets[name]),
            "bias": "none",
            "init_weights": True,
            "task_type": None if name == "bert" else "CAUSAL_LM",
            "inference_mode": True,
            "exclude_modules": None,
            "layers_to_transform": None,
            "layers_pattern": None,
            "modules_to_save": None,
            "base_model_name_or_path": "x",
            "auto_mapping": None,
            "revision": None,
        }
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        _make_lora(folder / f"{name}-lora", model, config, **LORAS[name])


LORAS: dict[str, dict[str, Any]] = {
    "llama": {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"layers.1.up_proj": 6}},
    "sharded": {"use_rslora": True, "lora_bias": True},
    "gpt2": {"fan_in_fan_out": True},
    "bert": {"use_dora": True},
}
"""What each model's LoRA has beside a rank of 4."""


def _make_lora(folder: Path, model: Any, block: dict[str, Any], **fields: Any) -> None:
    """A LoRA of the layers that a Bone adapter is of."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    config = {**block, "peft_type": "LORA", "r": 4, "lora_alpha": 8, "init_lora_weights": True}
    del config["init_weights"]
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for site, layer in model.named_modules():
        if site.rpartition(".")[2] not in block["target_modules"] or not hasattr(layer, "weight"):
            continue
        shape = tuple(layer.weight.shape)
        o, i = shape if isinstance(layer, torch.nn.Linear) else shape[::-1]
        r = 2 if site.endswith("up_proj") and "rank_pattern" in fields else 4
        parts: dict[str, tuple[int, ...]] = {"lora_A.weight": (r, i), "lora_B.weight": (o, r)}
        parts |= {"lora_B.bias": (o,)} if fields.get("lora_bias") else {}
        parts |= {"lora_magnitude_vector": (o,)} if fields.get("use_dora") else {}
        for part, sizes in parts.items():
            values = 0.05 * torch.randn(*sizes, generator=generator)
            tensors[f"base_model.model.{site}.{part}"] = values
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config | fields))


def _make_gguf(file: Path) -> None:
    """A tiny Llama as GGUF, in float32, with random weights."""
    import gguf
    import numpy as np

    numbers = np.random.default_rng(0)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(48)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(64)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["!#", *(chr(33 + i) for i in range(63))])
    writer.add_token_merges(["! #"])
    shapes = {
        **dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (32, 32)),
        **dict.fromkeys(("ffn_gate", "ffn_up"), (48, 32)),
        "ffn_down": (32, 48),
        "attn_norm": (32,),
        "ffn_norm": (32,),
    }
    named = {f"blk.0.{name}.weight": shape for name, shape in shapes.items()}
    named |= {"token_embd.weight": (64, 32), "output.weight": (64, 32), "output_norm.weight": (32,)}
    for name, shape in named.items():
        writer.add_tensor(name, numbers.normal(1, 0.1, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def is_whole(output: Path) -> bool:
    """Whether an output is as its manifest says."""
    try:
        files = json.loads((output / "bone_export.json").read_text())["files"]
        return all(
            hashlib.sha256((output / name).read_bytes()).hexdigest() == entry["sha256"]
            for name, entry in files.items()
        )
    except (OSError, ValueError, KeyError):
        return False


def remove(folder: Path) -> None:
    """Remove a folder, whatever is in it and whatever it is called."""
    shutil.rmtree(os.fsencode(folder), ignore_errors=True)


def print_table(title: str, rows: Mapping[str, object]) -> None:
    """A table of two columns."""
    print(f"| {title} | runs |\n|---|---|")
    for name, value in rows.items():
        print(f"| {name} | {value} |")
