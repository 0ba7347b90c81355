"""The page and the model card: whole, safe whatever files say, and the same as the manifest."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

import bone_fx
from bone_fx.deploy.report.card import card
from bone_fx.deploy.report.heat_map import heat_map
from bone_fx.deploy.report.origin import read_origin
from bone_fx.deploy.report.page import page
from bone_fx.deploy.report.signature import signature_rows
from bone_fx.errors import VerificationError
from bone_fx.verify import constants
from tests.command import run
from tests.end_to_end.tiny import tiny_adapter, tiny_base

EVIL = '<script>alert(1)</script>|`[x](http://a.b)`"\x1b[31m\u202e'
VOID = {"meta", "br", "rect"}


class Page(HTMLParser):
    """What a browser would see of a page: its elements, its text, and what it would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.loads: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.loads += [f"{k}={v}" for k, v in attrs if k in ("src", "href", "xlink:href", "action")]
        self.loads += [str(v) for k, v in attrs if k.startswith("on") or "url(" in str(v)]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def tokens_of(text: str) -> list[Any]:
    """The tokens of a model card's Markdown, as a page that allows HTML would read it."""
    body = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    markdown = MarkdownIt("commonmark", {"html": True}).enable("table")
    tokens = markdown.parse(body)
    return [*tokens, *(child for token in tokens for child in token.children or ())]


@pytest.fixture(scope="module")
def folded(tmp_path_factory: pytest.TempPathFactory) -> bone_fx.FoldResult:
    """A fold of inputs whose names and cards try to become HTML, Markdown and escapes."""
    folder = tmp_path_factory.mktemp("fold")
    name = EVIL.replace("/", "-")
    tiny_base(folder / name)
    text = json.dumps([EVIL, "mit"])
    (folder / name / "README.md").write_text(f"---\nlicense: {text}\nbase_model: {text}\n---\n")
    (folder / name / "LICENSE").write_text("do what you like")
    tiny_adapter(folder / "ad", base_model_name_or_path=EVIL)
    (folder / "ad" / "README.md").write_text("---\nbase_model: some/base\n---\n")
    return bone_fx.fold_checkpoint(folder / name, adapters=[folder / "ad"], output=folder / "out")


def test_the_page_runs_nothing_and_loads_nothing(folded: bone_fx.FoldResult) -> None:
    text = (folded.output / "report.html").read_text("utf-8")
    seen = Page(text)
    assert not seen.loads
    assert not seen.tags & {"script", "link", "img", "iframe", "object", "a"}
    assert "url(" not in text
    assert "@import" not in text
    assert "<script>alert(1)</script>" in seen.text
    assert not [c for c in text if c != "\n" and not c.isprintable()]


def test_the_page_says_what_the_manifest_says(folded: bone_fx.FoldResult) -> None:
    seen = Page((folded.output / "report.html").read_text("utf-8"))
    manifest = json.loads((folded.output / "bone_export.json").read_text())
    values = [*manifest["base"]["files"].values(), *manifest["adapters"][0]["files"].values()]
    values += [entry["sha256"] for entry in manifest["files"].values()]
    values += [*manifest["change"], *manifest["verification"]["ran"], *manifest["notes"]]
    assert not [value for value in values if value not in seen.text]
    order = [seen.text.index(head) for head in ("Warnings", "Inputs", "Verification", "Timings")]
    assert order == sorted(order)


def test_the_manifest_has_the_card_and_no_bytes_of_the_page(folded: bone_fx.FoldResult) -> None:
    manifest = json.loads((folded.output / "bone_export.json").read_text())
    assert "README.md" in manifest["files"]
    assert manifest["also_written"] == ["report.html"]
    assert manifest["base"]["license"][1] == "mit"
    assert manifest["base"]["license_files"] == ["LICENSE"]
    assert manifest["adapters"][0]["base_model"] == ["some/base"]


def test_the_card_holds_no_markup_of_the_inputs(folded: bone_fx.FoldResult) -> None:
    text = (folded.output / "README.md").read_text("utf-8")
    tokens = tokens_of(text)
    assert not [t.content for t in tokens if t.type in ("html_block", "html_inline", "image")]
    assert not [t for t in tokens if t.type == "link_open"]
    rows = sum(t.type == "tr_open" for t in tokens)
    assert rows == 4, "a pipe in a name is no cell"
    front = text.split("---\n")[1].splitlines()
    assert front[:3] == ['license: "other"', "base_model:", '- "some/base"']


def test_an_output_with_an_edited_card_or_page_is_left_alone(tmp_path: Path) -> None:
    tiny_base(tmp_path / "base")
    tiny_adapter(tmp_path / "ad")
    arguments = ("fold", tmp_path / "base", "--adapter", tmp_path / "ad", "-o", tmp_path / "out")
    assert run(*arguments).returncode == 0
    assert run(*arguments, "--overwrite").returncode == 0
    for name in ("README.md", "report.html"):
        written = (tmp_path / "out" / name).read_bytes()
        (tmp_path / "out" / name).write_text("my own words")
        assert run(*arguments, "--overwrite").returncode == 2
        assert (tmp_path / "out" / name).read_text() == "my own words"
        (tmp_path / "out" / name).write_bytes(written)


def test_a_build_that_fails_has_a_page_that_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise VerificationError(f"verification failed: layer {EVIL}")

    tiny_base(tmp_path / "base")
    tiny_adapter(tmp_path / "ad")
    monkeypatch.setattr(constants, "verify_constants", refuse)
    with pytest.raises(VerificationError):
        bone_fx.export(tmp_path / "base", adapters=[tmp_path / "ad"], output=tmp_path / "out")
    seen = Page((tmp_path / "out.rejected" / "report.html").read_text())
    assert "verification failed, not published" in seen.text
    assert "verification failed: layer <script>" in seen.text
    assert not seen.tags & {"script", "a"}


CARDS = {
    "nothing": ("just words", {}),
    "front matter is not closed": ("---\nlicense: mit\n", {"license": ["mit"]}),
    "a list over lines": (
        "---\nbase_model:\n- a/b\n  \n- c/d\ntags: [x]\n---",
        {"base_model": ["a/b", "c/d"]},
    ),
    "no YAML": ("---\nlicense: [mit\nlicense_name: {\n---", {}),
    "an object": ("---\nlicense: {a: b}\n---", {}),
    "later words": ("---\ntags: [x]\n---\nlicense: mit\n", {}),
    "bytes": ("---\r\nlicense: apache-2.0\r\n---", {"license": ["apache-2.0"]}),
    "aliases": ("---\nlicense: [&a [x, x], *a, mit]\n---", {"license": ["mit"]}),
    "deep": ("---\nlicense: " + "[" * 4000 + "\n---", {}),
    "long": ("---\nlicense: " + "x" * 9000 + "\n---", {"license": ["x" * 200]}),
    "a number": ("---\nlicense: 3\n---", {"license": ["3"]}),
}


@pytest.mark.parametrize("case", CARDS)
def test_licence_and_base_are_read_as_data(case: str, tmp_path: Path) -> None:
    text, expected = CARDS[case]
    (tmp_path / "README.md").write_text(text)
    assert read_origin("no/such/folder", tmp_path) == expected


def test_rows_are_layers_and_columns_are_sites() -> None:
    figures = {
        **{f"model.layers.{i}.mlp.up_proj": 0.1 * i for i in (0, 2, 10)},
        "model.layers.2.attn.q_proj": 0.5,
        "score": None,
        "head": 0.25,
    }
    drawn = heat_map(figures)
    assert drawn is not None
    assert [label for label, _ in drawn.rows] == [
        "model.layers.0",
        "model.layers.2",
        "model.layers.10",
        "",
    ]
    assert [label for label, _ in drawn.columns] == ["up_proj", "q_proj", "head"]
    assert max(drawn.cells, key=lambda cell: cell.strength).site == "model.layers.10.mlp.up_proj"
    assert heat_map({}) is None
    assert heat_map({"head": None}) is None


def test_experts_share_a_column() -> None:
    drawn = heat_map({f"layers.1.experts.{i}.{w}": 0.01 * i for i in range(20) for w in "ab"})
    assert drawn is not None
    assert [label for label, _ in drawn.columns] == ["a", "b"]
    assert [cell.value for cell in drawn.cells] == [0.19, 0.19]


def test_names_of_one_ending_are_told_apart() -> None:
    drawn = heat_map({"h.0.attn.c_proj": 0.1, "h.0.mlp.c_proj": 0.2, "h.1.mlp.c_proj": 0.0})
    assert drawn is not None
    assert [label for label, _ in drawn.columns] == ["attn.c_proj", "mlp.c_proj"]


def test_both_are_made_of_a_manifest_alone(folded: bone_fx.FoldResult) -> None:
    """A later verification writes them again from the file."""
    manifest = json.loads((folded.output / "bone_export.json").read_text())
    files = {n: e for n, e in manifest["files"].items() if n != "README.md"}
    assert card({**manifest, "files": files}) == (folded.output / "README.md").read_text("utf-8")
    assert Page(page(manifest, [])).text


def test_layers_of_one_kind_are_one_row_of_inputs() -> None:
    caches = {f"past_key_values.{n}.key": f"float32[b, {2 if n < 9 else 1}, 8]" for n in range(12)}
    rows = signature_rows({"input_ids": "int64[b, s]", **caches, "x.own": "bool[3]"})
    assert [(row.name, row.kind) for row in rows] == [
        ("input_ids", "int64[b, s]"),
        ("past_key_values.N.key", "float32[b, 2, 8]"),
        ("past_key_values.N.key", "float32[b, 1, 8]"),
        ("x.own", "bool[3]"),
    ]
    assert [row.meaning.rpartition("N is ")[2] for row in rows[1:3]] == ["0 to 8", "9 to 11"]
    assert rows[3].meaning == ""
