"""Damage to the files of a base and of an adapter, one at a time, chosen by a random generator."""

from __future__ import annotations

import json
import os
import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECRET = "a-secret-that-stands-outside"
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 7, 10**6, 10**9, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308),
    *(float("nan"), float("inf"), "", "x", "1", "../../secret", "/etc/passwd", "\x1b[31mred\x07"),
    *("x" * 10_000, "a\nb", "\u202e", "\ud800", [], {}, [[]], [0], ["q_proj"], {"a": {"b": [1]}}),
    *([1] * 1000, {str(i): i for i in range(100)}, "all-linear", "bat", "mini", "CAUSAL_LM"),
]
PATTERNS = [
    *("([a-z0-9_.]+)+!", r"(?:\w|\.|[a-z])+(?=#)", "x{99999999999}", "(x{5000}){5000}", "(" * 3000),
    *(
        "(.*)*(.*)*#",
        "(?R)",
        "[",
        "*",
        "\\",
        ".*",
        r"(?P<a>.)(?P<a>.)",
        "(layers)",
        r"\1",
        "(?i)Q.*",
    ),
]
_NOT_POSSIBLE = (OSError, LookupError, TypeError, ValueError, AttributeError, RecursionError)
"""What reading a file raises that an earlier damage made something else of."""
HEADER_DTYPES = ["F64", "F32", "F16", "BF16", "I64", "BOOL", "F8_E4M3", "C64", "F4", "", 3, None]


def damage(choose: random.Random, folder: Path) -> str:
    """Damage one thing in a folder with `base` and `adapter`; what was done."""
    kind = choose.choice(list(KINDS))
    try:
        return f"{kind}: {KINDS[kind](choose, folder)}"
    except _NOT_POSSIBLE as error:
        return f"{kind}: not possible, {type(error).__name__}"


def _bytes(path: Path) -> bytes:
    """The content of a file; what an earlier damage made a pipe or a device of is not opened."""
    if not path.is_file():
        raise ValueError(f"{path} is no file")
    return path.read_bytes()


def _field(choose: random.Random, folder: Path, name: str) -> str:
    """Another value in a field of a JSON file, a field more or less."""
    path = folder / name
    content = json.loads(_bytes(path))
    place, outer = content, ""
    while inner := [key for key, value in place.items() if isinstance(value, dict) and value]:
        if choose.random() < 0.5:
            break
        outer = choose.choice(inner)
        place = place[outer]
    key = choose.choice([*place, "new"])
    if choose.random() < 0.15:
        place.pop(key, None)
        value: Any = "(gone)"
    else:
        value = choose.choice(VALUES)
        place[key] = value
    path.write_text(json.dumps(content))
    return f"{name} {outer}.{key} = {ascii(value)[:40]}"


def _config(choose: random.Random, folder: Path) -> str:
    return _field(choose, folder, "base/config.json")


def _adapter_config(choose: random.Random, folder: Path) -> str:
    return _field(choose, folder, "adapter/adapter_config.json")


def _beside(choose: random.Random, folder: Path) -> str:
    names = ("generation_config.json", "tokenizer_config.json", "tokenizer.json")
    return _field(choose, folder, f"base/{choose.choice(names)}")


def _pattern(choose: random.Random, folder: Path) -> str:
    path = folder / "adapter" / "adapter_config.json"
    content = json.loads(_bytes(path))
    pattern = choose.choice(PATTERNS)
    field = choose.choice(
        ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern")
    )
    content[field] = [pattern] if field == "modules_to_save" else pattern
    if field == "layers_pattern":
        content["layers_to_transform"] = [0]
    path.write_text(json.dumps(content))
    return f"{field} = {pattern[:20]}"


def _text(choose: random.Random, folder: Path) -> str:
    """A JSON file whose text is broken."""
    path = choose.choice(sorted(folder.glob("*/*.json")))
    raw = _bytes(path)
    at = choose.randrange(len(raw))
    ways: dict[str, Callable[[], bytes]] = {
        "cut": lambda: raw[:at],
        "byte": lambda: raw[:at] + bytes([choose.randrange(256)]) + raw[at + 1 :],
        "null": lambda: raw[:at] + b"\0" + raw[at:],
        "bom": lambda: b"\xef\xbb\xbf" + raw,
        "utf-16": lambda: raw.decode().encode("utf-16"),
        "deep": lambda: raw.replace(b"{", b'{"deep": ' + b"[" * 5000 + b"]" * 5000 + b",", 1),
        "digits": lambda: raw.replace(b"{", b'{"digits": ' + b"9" * 5000 + b",", 1),
        "twice": lambda: raw.replace(b"{", raw[: at or 1], 1),
        "list": lambda: b"[" + raw + b"]",
        "empty": lambda: b"",
    }
    way = choose.choice(list(ways))
    path.write_bytes(ways[way]())
    return f"{path.name} {way}"


def _tensors(choose: random.Random, folder: Path) -> str:
    """Another header of a safetensors file, or other bytes."""
    path = choose.choice(sorted(folder.glob("*/*.safetensors")))
    raw = _bytes(path)
    size = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    key = choose.choice([k for k in header if k != "__metadata__"])
    way = choose.choice(
        [
            "dtype",
            "shape",
            "offsets",
            "name",
            "gone",
            "more",
            "value",
            "cut",
            "size",
            "byte",
            "meta",
        ]
    )
    entry = header[key]
    if way == "dtype":
        entry["dtype"] = choose.choice(HEADER_DTYPES)
    elif way == "shape":
        entry["shape"] = choose.choice(
            [[], [-1], [10**12, 10**12], [*entry["shape"], 1], "x", None]
        )
    elif way == "offsets":
        entry["data_offsets"] = choose.choice([[0, 0], [5, 1], [0, 10**18], [], None, [0.5, 1]])
    elif way == "name":
        header[choose.choice(["", "x", "a\x1b[31mb", "../x", "é" * 300, "\n"])] = header.pop(key)
    elif way == "gone":
        del header[key]
    elif way == "more":
        header["more.bone_block"] = dict(entry)
    elif way == "meta":
        header["__metadata__"] = choose.choice([3, {"format": 3}, {"format": "tf"}, None, {}])
    elif way == "value":
        at, value = entry["data_offsets"][0], choose.choice([b"\0\0\xc0\x7f", b"\0\0\x80\x7f"])
        data = data[:at] + value + data[at + 4 :]
    text = json.dumps(header).encode()
    content = len(text).to_bytes(8, "little") + text + data
    if way == "cut":
        content = raw[: choose.randrange(len(raw))]
    elif way == "size":
        content = choose.choice([0, 1, size - 1, size + 1, 2**40, 2**64 - 1]).to_bytes(8, "little")
        content += raw[8:]
    elif way == "byte":
        at = choose.randrange(min(len(raw), 2000))
        content = raw[:at] + bytes([choose.randrange(256)]) + raw[at + 1 :]
    path.write_bytes(content)
    return f"{path.name} {way} of {key}"


def _index(choose: random.Random, folder: Path) -> str:
    path = folder / "base" / "model.safetensors.index.json"
    content = json.loads(_bytes(path))
    weights = content["weight_map"]
    key = choose.choice(sorted(weights))
    names = [
        "../secret",
        "/etc/passwd",
        "gone.safetensors",
        "",
        ".",
        3,
        None,
        "config.json",
        "a\\b",
    ]
    weights[key] = choose.choice(names)
    if choose.random() < 0.2:
        content["weight_map"] = choose.choice(VALUES)
    path.write_text(json.dumps(content))
    return f"{key} in {weights[key]!a}"


def _kind_of_file(choose: random.Random, folder: Path) -> str:
    """Something else in the place of a file, or one more."""
    path = choose.choice(sorted(folder.glob("*/*.*")))
    if choose.random() < 0.4:
        path = path.with_name(choose.choice(["vocab.txt", "notes.txt", "merges.txt", "extra.json"]))
    way = choose.choice(
        ["pipe", "folder", "link out", "dangling", "loop", "device", "socket", "gone"]
    )
    path.unlink(missing_ok=True)
    if way == "pipe":
        os.mkfifo(path)
    elif way == "folder":
        path.mkdir()
    elif way == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    elif way != "gone":
        targets = {"link out": "../secret", "dangling": "gone", "loop": path.name}
        path.symlink_to(targets.get(way, "/dev/zero"))
    return f"{path.name}: {way}"


def _gguf(choose: random.Random, folder: Path) -> str:
    path = folder / "base.gguf"
    raw = bytearray(_bytes(path))
    for _ in range(choose.randrange(1, 4)):
        raw[choose.randrange(len(raw))] = choose.randrange(256)
    path.write_bytes(raw[: choose.randrange(len(raw) + 1)])
    return "bytes"


def _name(choose: random.Random, folder: Path) -> str:
    """A file more, with a name that is hard to print."""
    name = choose.choice([b"\xff\xfe.json", b"a\nb.txt", b"\x1b[31m.json", b"x" * 255, b"-rf"])
    place = os.path.join(os.fsencode(folder), choose.choice([b"base", b"adapter"]), name)
    with open(place, "wb") as file:
        file.write(b"{}")
    return ascii(name[:20])


KINDS: dict[str, Callable[[random.Random, Path], str]] = {
    "config": _config,
    "config again": _config,
    "adapter config": _adapter_config,
    "adapter config again": _adapter_config,
    "beside": _beside,
    "pattern": _pattern,
    "text": _text,
    "tensors": _tensors,
    "tensors again": _tensors,
    "index": _index,
    "kind of file": _kind_of_file,
    "gguf": _gguf,
    "name": _name,
}
