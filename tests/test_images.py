"""Calibration with rows of images and text: what tower and language part are fed, the result in use, killed or not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import sighted
import torch
import toys
import transformers
from safetensors.torch import load_file
from torch import Tensor

import losparse_cli
from losparse_cli import Calibration, Recipe
from losparse_cli.compression.plan import Job
from losparse_cli.errors import UsageError
from losparse_cli.text.inputs import Inputs
from losparse_cli.text.sample import hold_out
from tests.killing import Killed, kill_at

pytest.importorskip("PIL")
FIRST = (r"re:.*\.0\.",)
"""The first blocks of each stack: what goes for them goes for the others."""
FLOATS = Recipe(keep=0.6, rank_ratio=0.2, iterations=4, targets=FIRST)
CODES = Recipe(bits=5, targets=FIRST)
TOWERS = {"llava": "vision_tower", "idefics3": "vision_model", "qwen2_vl": "visual"}


@pytest.fixture
def dense(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The model that a test is parametrized by; where its processor needs torchvision, ours stands in."""
    if request.param == "qwen2_vl":
        monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda *_, **__: sighted.QwenProcessor())
    return sighted.write(getattr(sighted, request.param), tmp_path / "dense")


def tensors_of(folder: Path, part: str) -> dict[str, Tensor]:
    found = {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}
    return {name: tensor for name, tensor in found.items() if part in name and ".0." in name}


def inputs_of(job: Job) -> Inputs:
    assert isinstance(job.windows, Inputs)
    return job.windows


@pytest.mark.parametrize("dense", TOWERS, indirect=True)
@pytest.mark.parametrize("alone", [(), (1, 4)], ids=["images", "mixed"])
def test_a_tower_is_measured_on_what_it_is_fed(dense: Path, alone: Sequence[int], tmp_path: Path) -> None:
    """The error of the first block on held-out rows is that of what its layers give for what the dense model feeds."""
    asked = Calibration(str(sighted.rows(tmp_path / "rows", 9, alone=alone)))
    job = losparse_cli.plan(dense, tmp_path / "small", FLOATS, calibration=asked)
    assert not job.route.why
    assert not job.route.blind
    first = job.route.blocks[0]
    assert any(part in first for part in TOWERS.values())
    assert bool(job.route.optional) == bool(alone)
    report = losparse_cli.compress(dense, tmp_path / "small", FLOATS, calibration=asked).report
    model = transformers.AutoModelForImageTextToText.from_pretrained(dense, dtype=torch.float32).eval()
    ours = losparse_cli.load(tmp_path / "small")[0].float()
    fed: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if name.startswith(first):
            module.register_forward_pre_hook(
                lambda _, args, name=name: args and fed.setdefault(name, []).append(args[0])
            )
    with torch.no_grad():
        for batch in hold_out(inputs_of(job))[1].batches(1):
            model(**batch)
        measured = 0
        for layer in report.layers:
            assert layer.output_error is not None, layer.name
            if layer.name in fed:
                X = torch.cat([x.reshape(-1, layer.shape[1]) for x in fed[layer.name]])
                expected = model.get_submodule(layer.name)(X)
                error = float((ours.get_submodule(layer.name)(X) - expected).norm() / expected.norm())
                assert layer.held_out_error == pytest.approx(error, rel=1e-3), layer.name
                measured += 1
    assert measured or hold_out(inputs_of(job))[1].rows[0].keys().isdisjoint({"pixel_values"})


@pytest.mark.parametrize("dense", TOWERS, indirect=True)
def test_images_change_both_parts_and_the_result_writes(dense: Path, request: Any, tmp_path: Path) -> None:
    made = {}
    for name, seed, text in (("one", 0, False), ("other", 1, False), ("words", 0, True)):
        rows = sighted.rows(tmp_path / name, alone=range(12) if text else (2,), seed=0, pixels=seed)
        made[name] = losparse_cli.compress(dense, tmp_path / f"{name}-small", CODES, calibration=str(rows))
    tower = next(part for key, part in TOWERS.items() if key in request.node.callspec.id)
    for part in (tower, "layers.0.self_attn.o_proj"):
        one, other, words = (tensors_of(made[name].output, part) for name in made)
        assert one
        assert any(not torch.equal(one[key], other[key]) for key in one.keys() & other.keys()), part
        assert any(not torch.equal(one[key], words[key]) for key in one.keys() & words.keys()), part
    reached = {layer.name for layer in made["words"].report.layers if layer.tokens}
    assert not any(tower in name for name in reached), "text alone never gets to a tower"
    assert all(layer.tokens for layer in made["one"].report.layers)
    folder = made["one"].output
    assert losparse_cli.verify(folder).sound
    losparse_cli.register()
    processor = transformers.AutoProcessor.from_pretrained(folder)
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    from PIL import Image

    place = getattr(processor, "place", "<image>")
    with Image.open(tmp_path / "one" / "images" / "0.png") as image:
        batch = processor(text=[f"{place}what"], images=[image], return_tensors="pt")
    written = model.generate(**batch, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert written.shape[1] == batch["input_ids"].shape[1] + 3


@pytest.mark.parametrize("dense", ["llava"], indirect=True)
@pytest.mark.parametrize("refinement", [None, "blocks"])
def test_killed_anywhere_it_ends_with_the_same_bytes(
    dense: Path, refinement: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = sighted.rows(tmp_path / "rows", 6, alone=(1, 3))
    how: dict[str, Any] = {"recipe": CODES} if refinement is None else {"recipe": FLOATS, "refinement": {"steps": 4}}

    def run(name: str) -> dict[str, str]:
        made = losparse_cli.compress(dense, tmp_path / name / "out", calibration=str(rows), **how)
        assert refinement is None or made.report.blocks
        return toys.digests(made.output)

    whole = run("whole")
    for stop in (0, 30, 60, 75):
        with monkeypatch.context() as patched:
            kill_at(patched, stop)
            with pytest.raises(Killed):
                run("killed")
    assert run("killed") == whole


@pytest.mark.parametrize("dense", ["vit"], indirect=True)
def test_a_model_of_images_alone(dense: Path, tmp_path: Path) -> None:
    rows = sighted.rows(tmp_path / "rows", text=False)
    result = losparse_cli.compress(dense, tmp_path / "small", CODES, calibration=str(rows))
    assert all(layer.held_out_error and layer.log_step is not None for layer in result.report.layers)
    losparse_cli.register()
    model = transformers.AutoModelForImageClassification.from_pretrained(result.output)
    assert model(torch.randn(1, 3, 16, 16)).logits.shape == (1, 3)
    with pytest.raises(UsageError, match=r"reads pixel_values, not text.*'image' names images"):
        losparse_cli.compress(dense, tmp_path / "other", calibration=__file__)


@pytest.mark.parametrize("dense", ["clip"], indirect=True)
def test_a_model_that_compares_images_with_text(dense: Path, tmp_path: Path) -> None:
    rows = sighted.rows(tmp_path / "rows", 6)
    result = losparse_cli.compress(dense, tmp_path / "small", CODES, calibration=str(rows))
    assert {layer.name.partition(".")[0] for layer in result.report.layers} == {"text_model", "vision_model"}
    assert all(layer.held_out_error and layer.log_step is not None for layer in result.report.layers)
    rows = sighted.rows(tmp_path / "mixed", 6, alone=(1,))
    with pytest.raises(UsageError, match=r"CLIPModel cannot be run on text alone \(.*Give every row an image."):
        losparse_cli.compress(dense, tmp_path / "other", CODES, calibration=str(rows))


@pytest.mark.parametrize("dense", ["llava"], indirect=True)
def test_sizes_by_error_and_a_process_that_only_plans(dense: Path, tmp_path: Path) -> None:
    rows = sighted.rows(tmp_path / "rows", alone=(1, 3))
    recipe = Recipe(keep=0.6, iterations=2, allocate="error", targets=(r"re:.*\.0\.mlp",))
    assert losparse_cli.compress(dense, tmp_path / "small", recipe, calibration=str(rows)).report.layers
    forecast = losparse_cli.forecast(losparse_cli.plan(dense, tmp_path / "next", calibration=str(rows)))
    assert forecast.to_dict()["calibration"]["windows"] == 12


@pytest.mark.parametrize("dense", ["llava"], indirect=True)
def test_a_whole_model_is_trained_on_text_alone(dense: Path, tmp_path: Path) -> None:
    rows = sighted.rows(tmp_path / "rows", 3)
    with pytest.raises(UsageError, match=r"rows.jsonl has images, and a whole model is trained on text alone"):
        losparse_cli.compress(dense, tmp_path / "small", bits=5, calibration=str(rows), refinement="model")
    shutil.rmtree(tmp_path / "rows")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


@pytest.mark.parametrize("dense", ["llava"], indirect=True)
def test_a_tower_that_only_rows_held_out_reach_is_not_matched(dense: Path, tmp_path: Path) -> None:
    for image in range(6):
        folder = tmp_path / f"rows-{image}"
        asked = Calibration(str(sighted.rows(folder, 6, alone=[k for k in range(6) if k != image])))
        job = losparse_cli.plan(dense, tmp_path / "small", CODES, calibration=asked, refinement={"steps": 2})
        if "pixel_values" in hold_out(inputs_of(job))[1].rows[0]:
            break
    report = losparse_cli.compress(
        dense, tmp_path / "small", CODES, calibration=asked, refinement={"steps": 2}
    ).report  # fmt: skip
    assert report.blocks
    assert not any(TOWERS["llava"] in block["name"] for block in report.blocks)


@pytest.mark.parametrize("dense", ["llava"], indirect=True)
@pytest.mark.parametrize("name", ["a\0b.png", "a" * 5000, "/".join(["a" * 200] * 100), "circle.png"])
def test_what_is_no_path_is_said_in_a_sentence(dense: Path, name: str, tmp_path: Path) -> None:
    rows = sighted.rows(tmp_path / "rows", 2)
    (rows.parent / "circle.png").symlink_to("circle.png")
    rows.write_text(json.dumps({"image": name, "text": "It"}) + "\n")
    with pytest.raises(UsageError, match=r"line 1 names the image .* no path") as error:
        losparse_cli.plan(dense, tmp_path / "small", CODES, calibration=str(rows))
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("dense", ["llava"], indirect=True)
@pytest.mark.parametrize("count", [1, 5])
def test_images_that_claim_too_many_pixels_are_not_unfolded(dense: Path, count: int, tmp_path: Path) -> None:
    from PIL import Image

    rows = sighted.rows(tmp_path / "rows", 2)
    side = 14_000 if count == 1 else 4096
    Image.new("1", (side, side)).save(rows.parent / "large.png")
    rows.write_text(json.dumps({"image": ["large.png"] * count, "text": "It"}) + "\n")
    with pytest.raises(UsageError, match=r"line 1 .*(more than [\d,]+|too many) pixels.*smaller"):
        losparse_cli.plan(dense, tmp_path / "small", CODES, calibration=str(rows))


@pytest.mark.parametrize("dense", ["llava"], indirect=True)
def test_a_field_without_images_is_refused_where_it_was_named(dense: Path, tmp_path: Path) -> None:
    asked = Calibration(str(sighted.rows(tmp_path / "rows", 3)), image_field="picture")
    with pytest.raises(UsageError, match="no row with an image in 'picture'"):
        losparse_cli.plan(dense, tmp_path / "small", CODES, calibration=asked)


def test_empty_lists_of_images_are_none(toy: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"image": [], "text": "Nothing to be seen. " * 20}) + "\n")
    job = losparse_cli.plan(toy("llama", tokenizer=True), tmp_path / "small", calibration=str(path))
    assert job.calibration is not None
    assert job.calibration.image_field is None


@pytest.mark.parametrize("dense", ["llava"], indirect=True)
def test_metadata_of_images_warns_of_nothing(dense: Path, tmp_path: Path) -> None:
    from PIL import Image

    rows = sighted.rows(tmp_path / "rows", 2)
    broken = b"Exif\0\0II*\0\xff\xff\xff\xffbroken"
    Image.new("RGB", (20, 24)).save(rows.parent / "broken.jpg", exif=broken)
    rows.write_text(json.dumps({"image": "broken.jpg", "text": "It"}) + "\n")
    assert losparse_cli.plan(dense, tmp_path / "small", CODES, calibration=str(rows)).windows
