"""The card: what it claims comes from the report and the base, and its snippets can be pasted."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from losparse_cli.checkpoint.card import (
    address_card,
    base_metadata,
    write_card,
    write_form_card,
)
from losparse_cli.checkpoint.report import LayerReport, Report
from losparse_cli.shim.layouts import LayerSpec

LAYER = LayerReport("a", LayerSpec((10, 20), 2, 30, "unstructured", "gaps4", 4, 20), 400, 200, 100.0, 4.0, (0.2,))


def report(commit: str | None = "0" * 40, architecture: str = "LlamaForCausalLM") -> Report:
    source = {"name": "user/base", "commit": commit, "architecture": architecture}
    return Report((LAYER,), {}, 1000, 800, 500, source=source, recipe={"rank": 2, "sparsity": 0.85, "seed": 0})


def metadata_of(folder: Path) -> dict[str, Any]:
    return dict(yaml.safe_load((folder / "README.md").read_text().split("---")[1]))


def snippets(folder: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)


def test_numbers_are_those_of_the_report(tmp_path: Path) -> None:
    write_card(tmp_path, report(), {}, place="out")
    text = (tmp_path / "README.md").read_text()
    for part in (
        "400 | 200 | 50.0%",
        "1,000 | 800 | 80.0%",
        "200 | 90 | 45.0%",
        "0.2000",
        "rank 2, seed 0, sparsity 0.85",
    ):
        assert part in text


def test_no_error_is_named_where_none_was_measured(tmp_path: Path) -> None:
    write_card(tmp_path, report(), {}, place="out")
    line = "Relative Frobenius error of their weights: 0.2000.\n"
    measured = (tmp_path / "README.md").read_text()
    assert line in measured
    write_card(tmp_path, replace(report(), layers=(replace(LAYER, weight_squared=None),)), {}, place="out")
    assert (tmp_path / "README.md").read_text() == measured.replace(line, "")


def test_only_a_hub_model_is_a_base(tmp_path: Path) -> None:
    write_card(tmp_path, report(), {}, place="out")
    assert metadata_of(tmp_path)["base_model"] == "user/base"
    write_card(tmp_path, report(commit=None), {"base_model": "somebody/else"}, place="out")
    assert "base_model" not in metadata_of(tmp_path)


def test_the_licence_is_carried_and_none_is_made_up(tmp_path: Path) -> None:
    base = {"license": "other", "license_name": "llama3", "license_link": "LICENSE", "language": ["en", "no"]}
    write_card(tmp_path, report(), {**base, "inference": False, "tags": ["x", 5, None]}, place="out")
    found = metadata_of(tmp_path)
    assert {key: found[key] for key in base} == base
    assert found["tags"] == ["losparse", "low-rank", "sparse", "x"]
    assert "inference" not in found
    write_card(tmp_path, report(), {}, place="out")
    assert not [key for key in metadata_of(tmp_path) if key.startswith("license")]


@pytest.mark.parametrize("place", ["out", "user/name", 'we"ird', "back\\slash", "it's", "[x](y)", "模型", 'a") or ("b'])
def test_snippets_are_python_that_names_the_place(place: str, tmp_path: Path) -> None:
    import ast

    write_card(tmp_path, report(), {}, place="out")
    address_card(tmp_path, place)
    first, second = snippets(tmp_path)
    assert len(snippets(tmp_path)) == 2
    for text in (first, second):
        constants = [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)]
        assert place in constants
        assert place == "out" or "out" not in constants
    assert "trust_remote_code=True" in second
    address_card(tmp_path, "user/later")
    assert all('"user/later"' in text for text in snippets(tmp_path))


def test_a_card_without_our_snippet_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# Mine\n")
    address_card(tmp_path, "user/x")
    assert (tmp_path / "README.md").read_text() == "# Mine\n"
    address_card(tmp_path / "absent", "user/x")


@pytest.mark.parametrize(
    ("architecture", "auto"),
    [
        ("LlamaForCausalLM", "AutoModelForCausalLM"),
        ("GPT2LMHeadModel", "AutoModelForCausalLM"),
        ("BertModel", "AutoModel"),
        ("BartForConditionalGeneration", "AutoModelForSeq2SeqLM"),
        ("BertForSequenceClassification", "AutoModelForSequenceClassification"),
        ("BertForMaskedLM", "AutoModelForMaskedLM"),
        ("BertForMultipleChoice", "AutoModelForMultipleChoice"),
        ("T5EncoderModel", "AutoModelForTextEncoding"),
        ("ViTForImageClassification", "AutoModelForImageClassification"),
        ("WhisperForConditionalGeneration", "AutoModelForSpeechSeq2Seq"),
        ("Wav2Vec2ForCTC", "AutoModelForCTC"),
        ("Qwen2VLForConditionalGeneration", "AutoModelForImageTextToText"),
    ],
)
def test_the_snippet_names_the_auto_class(architecture: str, auto: str, tmp_path: Path) -> None:
    write_card(tmp_path, report(architecture=architecture), {}, place="out")
    assert f"import {auto}\n" in snippets(tmp_path)[1]
    assert f"{auto}.from_pretrained(" in snippets(tmp_path)[1]


def test_what_loads_only_with_the_package_says_so(tmp_path: Path) -> None:
    own = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    for config, says, trusts in (
        ({"architectures": ["OwnModel"], "auto_map": own}, "has a configuration of its own", True),
        ({"architectures": ["GPT2DoubleHeadsModel"], "model_type": "gpt2"}, "no Auto class", False),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        write_card(tmp_path, report(), {}, place="out")
        (snippet,) = snippets(tmp_path)
        assert says in (tmp_path / "README.md").read_text()
        assert ("trust_remote_code=True" in snippet) == trusts
        address_card(tmp_path, "user/later")
        assert 'load("user/later"' in snippets(tmp_path)[0]


@pytest.mark.parametrize("text", ["", "# No block\n", "---\n: [\n---\n", "---\n- a list\n---\n", "---\nlicense: mit\n"])
def test_a_base_card_that_says_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text)
    assert base_metadata(tmp_path) == {}


@pytest.mark.parametrize(
    ("spec", "says", "tags"),
    [
        (LayerSpec((10, 20), 2, 30, "unstructured", "gaps4", 4, 20), "low-rank part U V and a sparse matrix S, W ≈ U V",
         {"low-rank", "sparse"}),
        (LayerSpec((10, 20), 0, 30, "unstructured", "gaps4", 4, 20), "is stored as a sparse matrix S.", {"sparse"}),
        (LayerSpec((10, 20), 2, 0, "unstructured", "rows"), "product of two low-rank factors, W ≈ U V.", {"low-rank"}),
        (LayerSpec((10, 20), 0, 150, "unstructured", "codes", 0, 20), "is stored as whole numbers with", {"quantized"}),
        (LayerSpec((10, 20), 2, 150, "unstructured", "codes", 0, 20), "low-rank part U V and a part S of whole numbers",
         {"low-rank", "quantized"}),
    ],
)  # fmt: skip
def test_the_card_names_the_parts_that_there_are(spec: LayerSpec, says: str, tags: set[str], tmp_path: Path) -> None:
    write_card(tmp_path, replace(report(), layers=(replace(LAYER, spec=spec),)), {}, place="out")
    assert says in (tmp_path / "README.md").read_text()
    assert set(metadata_of(tmp_path)["tags"]) == tags | {"losparse"}
    coded = "quantized" in tags
    assert ("| bits a weight of the layers, embeddings and heads aside | 16 | 8.000 | 50.0% |" in
            (tmp_path / "README.md").read_text()) == coded  # fmt: skip


def test_a_base_without_a_card(tmp_path: Path) -> None:
    assert base_metadata(tmp_path) == {}


def test_the_card_of_an_export(tmp_path: Path) -> None:
    base = {
        "license": "mit",
        "base_model": "user/base",
        "base_model_relation": "quantized",
        "tags": ["losparse", "sparse", "x"],
        5: 6,
    }
    write_form_card(tmp_path, base, "user/small", "dense")
    found = metadata_of(tmp_path)
    assert found == {
        "license": "mit",
        "base_model": "user/base",
        "library_name": "transformers",
        "tags": ["losparse", "x"],
    }


def test_of_a_calibrated_result_text_and_held_out_error_are_named_not_that_of_weights(tmp_path: Path) -> None:
    layer = replace(LAYER, output_errors=(0.5, 0.125))
    text = {
        "source": "/home/somebody/wiki.txt", "tokens": 65536, "length": 512, "windows": 8, "held_out": 1,
        "warnings": ["4,096 tokens are few."],
    }  # fmt: skip
    write_card(tmp_path, replace(report(), layers=(layer,), calibration=text), {}, place="out")
    card = (tmp_path / "README.md").read_text()
    assert "on the very text they were solved with: 0.1250." in card
    layer = replace(layer, held_out_error=0.375)
    write_card(tmp_path, replace(report(), layers=(layer,), calibration=text), {}, place="out")
    card = (tmp_path / "README.md").read_text()
    assert "outputs on held-out calibration text: 0.3750." in card
    assert "Calibrated on 4,096 of 65,536 tokens asked for (the text has no more) in 8 windows from wiki.txt," in card
    assert "- 4,096 tokens are few." in card
    assert "Frobenius" not in card
    assert "somebody" not in card
