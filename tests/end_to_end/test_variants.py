"""Several adapters, each folded into a graph of its own, in one folder over one data file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

import bone_fx
from bone_fx.deploy import variants
from bone_fx.errors import UsageError, VerificationError
from bone_fx.runtime.session import open_session
from tests.command import run
from tests.end_to_end.tiny import tiny_adapter, tiny_base, tiny_tokenizer
from tests.tiers import slow

IDS = np.array([[5, 9, 2, 40, 3]], dtype=np.int64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two adapters, an export of each and one of both."""
    top = tmp_path_factory.mktemp("variants")
    base, poet = tiny_base(top / "base"), tiny_adapter(top / "poet")
    facts = tiny_adapter(top / "facts", std=0.1)
    for name in ("poet", "facts"):
        bone_fx.export(base, adapters=[top / name], output=top / f"{name} alone", dtype="fp16")
    variants = {"poet": poet, "facts": facts}
    result = bone_fx.export(base, variants=variants, output=top / "both", dtype="fp16")
    assert result.verified
    return top


def logits(model: Path) -> np.ndarray:
    session = open_session(model)
    past = {
        value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float16)
        for value in session.get_inputs()
        if value.name.startswith("past")
    }
    found: np.ndarray = session.run(
        ["logits"], {"input_ids": IDS, "attention_mask": np.ones_like(IDS), **past}
    )[0]
    return found


def test_each_graph_is_that_of_an_export_alone(folder: Path) -> None:
    outputs = {}
    for name in ("poet", "facts"):
        outputs[name] = logits(folder / "both" / f"{name}.onnx")
        assert np.array_equal(outputs[name], logits(folder / f"{name} alone" / "model.onnx"))
    assert not np.array_equal(outputs["poet"], outputs["facts"])


def test_what_no_adapter_touches_stands_once(folder: Path) -> None:
    places = []
    for name in ("poet", "facts"):
        tensors = onnx.load(
            folder / f"both/{name}.onnx", load_external_data=False
        ).graph.initializer
        places.append(
            {t.name: {e.key: e.value for e in t.external_data} for t in tensors if t.external_data}
        )
    same = {name for name, place in places[0].items() if places[1][name] == place}
    assert "model.embed_tokens.weight" in same
    assert "model.layers.0.self_attn.q_proj+k_proj+v_proj.weight" not in same
    assert {place["location"] for place in places[1].values()} == {"model.onnx.data"}
    sizes = [int(p["length"]) for name, p in places[0].items() if name in same]
    both, alone = (
        (folder / each / "model.onnx.data").stat().st_size for each in ("both", "poet alone")
    )
    assert both == pytest.approx(2 * alone - sum(sizes), abs=64 * len(places[0]))


def test_genai_opens_each_by_an_overlay(folder: Path) -> None:
    og = pytest.importorskip("onnxruntime_genai")

    def tokens(path: Path, variant: str | None = None) -> list[int]:
        config = og.Config(str(path))
        if variant is not None:
            config.overlay(json.dumps({"model": {"decoder": {"filename": f"{variant}.onnx"}}}))
        model = og.Model(config)
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=12, do_sample=False)
        generator = og.Generator(model, parameters)
        generator.append_tokens(IDS.astype(np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        return [int(token) for token in generator.get_sequence(0)]

    both = folder / "both"
    assert tokens(both) == tokens(both, "poet") == tokens(folder / "poet alone")
    assert tokens(both, "facts") == tokens(folder / "facts alone")


def test_the_manifest_has_each(folder: Path) -> None:
    manifest = json.loads((folder / "both/bone_export.json").read_text())
    alone = json.loads((folder / "facts alone/bone_export.json").read_text())
    facts = manifest["variants"]["facts"]
    assert facts["change"] == alone["change"]
    assert facts["verification"] == alone["verification"]
    assert [adapter["name"] for adapter in manifest["adapters"]] == ["poet", "facts"]
    assert {"poet.onnx", "facts.onnx", "model.onnx.data", "README.md"} <= set(manifest["files"])
    assert set(manifest["also_written"]) == {"poet.html", "facts.html", "report.html"}
    assert bone_fx.verify_export(folder / "both").files == len(manifest["files"])
    assert facts["file"] == "facts.onnx"
    for field in ("kind", "graph", "operators", "quantization", "placement"):
        assert facts[field] == alone[field]


def test_what_differs_stands_under_each(folder: Path, tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base", tie_word_embeddings=True)
    own = tiny_adapter(tmp_path / "own", modules_to_save=["lm_head"])
    file = own / "adapter_model.safetensors"
    head = torch.randn(128, 48, generator=torch.manual_seed(0))
    save_file({**load_file(file), "base_model.model.lm_head.weight": head}, file)
    every, out = {"poet": folder / "poet", "own": own}, tmp_path / "out"
    manifest = bone_fx.export(base, variants=every, output=out, dtype="int8", verify="off").manifest
    tied, untied = (manifest["variants"][name] for name in every)
    assert tied["operators"] != untied["operators"]
    assert tied["quantization"]["products"] == untied["quantization"]["products"]
    assert {"operators", "quantization"}.isdisjoint(manifest)
    assert manifest["graph"] == tied["graph"] == untied["graph"]  # of all: it stands above too
    assert bone_fx.verify_export(out).files == len(manifest["files"])
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


def test_each_is_verified_with_its_own_adapter(folder: Path) -> None:
    both, base, poet, facts = (folder / name for name in ("both", "base", "poet", "facts"))
    alone = json.loads((folder / "facts alone/bone_export.json").read_text())["verification"]
    for given in ({"variants": {"facts": facts, "poet": poet}}, {"adapters": [facts, poet]}):
        found = bone_fx.verify_export(both, base=base, **given).verification
        assert found is not None
        assert list(found["variants"]) == ["poet", "facts"]
        assert found["variants"]["facts"]["figures"] == alone["figures"]
        worst = max(each["figures"]["onnx_vs_unmerged"] for each in found["variants"].values())
        assert found["figures"]["onnx_vs_unmerged"] == worst
    assert not list(both.glob("*.edited.onnx"))


def test_a_variant_with_another_adapter(folder: Path, tmp_path: Path) -> None:
    both, base, poet, facts = (folder / name for name in ("both", "base", "poet", "facts"))
    wrong = {"poet": poet, "facts": poet}
    with pytest.raises(VerificationError, match=r"variant facts: .* adapters are not those"):
        bone_fx.verify_export(both, base=base, variants=wrong, verify="fast")
    other = tiny_adapter(tmp_path / "other", std=0.3)
    with pytest.raises(VerificationError, match="no variant was made from the adapter other"):
        bone_fx.verify_export(both, base=base, adapters=[poet, other])
    with pytest.raises(UsageError, match="the variant facts is compared with its own adapter"):
        bone_fx.verify_export(both, base=base, variants={"poet": poet})
    with pytest.raises(UsageError, match=r"there is no variant fact\b"):
        bone_fx.verify_export(both, base=base, variants={"fact": facts})
    with pytest.raises(UsageError, match="holds no variants"):
        bone_fx.verify_export(folder / "poet alone", base=base, variants={"poet": poet})
    with pytest.raises(UsageError, match="pass one or the other"):
        bone_fx.verify_export(both, base=base, adapters=[facts], variants={"poet": poet})
    with pytest.raises(UsageError, match="variants go with their base"):
        bone_fx.verify_export(both, variants={"poet": poet})


def test_a_graph_of_another_variant(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(folder / "both", out)
    shutil.copy(out / "poet.onnx", out / "facts.onnx")
    manifest = json.loads((out / "bone_export.json").read_text())
    manifest["files"]["facts.onnx"] = manifest["files"]["poet.onnx"]
    (out / "bone_export.json").write_text(json.dumps(manifest))
    given = {name: folder / name for name in ("poet", "facts")}
    with pytest.raises(VerificationError, match=r"variant facts: verification failed: model\."):
        bone_fx.verify_export(out, base=folder / "base", variants=given, verify="fast")
    arguments = [f"--variant={name}={folder / name}" for name in given]
    done = run("verify", out, "--base", folder / "base", *arguments, "--verify", "fast")
    assert done.returncode == 6
    assert "variant facts" in done.stderr


def test_two_runs_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    arguments = [folder / "base", "--dtype", "fp16", "--verify", "off", "-o", tmp_path / "again"]
    for name in ("poet", "facts"):
        arguments += ["--variant", f"{name}={folder / name}"]
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    for name in ("poet.onnx", "facts.onnx", "model.onnx.data", "genai_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / "both" / name).read_bytes()


@pytest.mark.parametrize("names", [("own", "poet"), *slow((("poet", "own"),))])
def test_variants_that_do_not_fit_one_folder(
    names: tuple[str, str], folder: Path, tmp_path: Path
) -> None:
    base = tiny_base(tmp_path / "base")
    tiny_tokenizer(base)
    own = tiny_adapter(tmp_path / "own")
    tiny_tokenizer(own)
    (own / "chat_template.jinja").write_text("another")
    every = {"own": own, "poet": folder / "poet"}
    variants = {name: every[name] for name in names}
    with pytest.raises(UsageError, match=rf"the variants {' and '.join(names)} differ in \w+"):
        bone_fx.export(base, variants=variants, output=tmp_path / "out", verify="off")
    assert not (tmp_path / "out").exists()


def test_constants_that_are_not_those_that_were_verified(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refer = variants._refer
    monkeypatch.setattr(variants, "_refer", lambda t, place, size: refer(t, place + 64, size))
    with pytest.raises(VerificationError, match=r"poet\.onnx: constants in the common"):
        bone_fx.export(folder / "base", variants={"poet": folder / "poet"}, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["", "a/b", "..", "model", "a.b", "é", "x" * 65])
def test_a_name_that_is_none(name: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no name for a variant"):
        bone_fx.export(
            folder / "base", variants={name: folder / "poet"}, output=tmp_path / "out", verify="off"
        )


def test_names_that_some_file_systems_take_for_one(folder: Path, tmp_path: Path) -> None:
    both = {"poet": folder / "poet", "Poet": folder / "facts"}
    with pytest.raises(UsageError, match="large and small letters only"):
        bone_fx.export(folder / "base", variants=both, output=tmp_path / "out", verify="off")


def test_what_is_no_variant(folder: Path, tmp_path: Path) -> None:
    poet, out = folder / "poet", tmp_path / "out"
    for given in ([f"={poet}"], ["poet"], [f"a={poet}", "--variant", f"a={poet}"]):
        done = run(folder / "base", "-o", out, "--variant", *given)
        assert done.returncode == 2, done.stderr
        assert "does not name a variant" in done.stderr
    with pytest.raises(UsageError, match="pass one or the other"):
        bone_fx.export(folder / "base", adapters=[poet], variants={"a": poet}, output=out)
