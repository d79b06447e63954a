"""Rows of images and text, as a model's own processor makes inputs of them; and rows that cannot be used."""

from __future__ import annotations

import builtins
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import sighted
import torch
import toys
from characters import character_tokenizer
from terminal import losparse

from losparse_cli.errors import LosparseError, MissingExtraError, SourceError, UsageError
from losparse_cli.models.skeleton import empty_model
from losparse_cli.text import inputs
from losparse_cli.text.inputs import Inputs, load_processor, read_inputs
from losparse_cli.text.request import ROW_LENGTH, Calibration, settle
from losparse_cli.text.sample import hold_out, repeated_share

pytest.importorskip("PIL")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sighted.write(sighted.llava, tmp_path_factory.mktemp("llava"))


def read(folder: Path, path: Path, **asked: Any) -> Inputs:
    skeleton = empty_model(folder, json.loads((folder / "config.json").read_text()))
    settled = settle(Calibration(str(path), **asked), skeleton, folder)
    return read_inputs(settled, skeleton, folder, 0)


def lines(path: Path, *rows: Mapping[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def said(row: Mapping[str, torch.Tensor]) -> str:
    """A row's tokens, an image in brackets."""
    return str(sighted.tokenizer().decode(row["input_ids"][0])).replace("<image>" * 4, "[]").replace("<s>", "")


# --- what becomes of a row --------------------------------------------------------------------------


def test_the_same_rows_are_drawn_by_the_same_seed_and_no_more_than_asked(model: Path, tmp_path: Path) -> None:
    path = sighted.rows(tmp_path, 20)
    some, again, all_of_them = (read(model, path, tokens=n) for n in (200, 200, 65536))
    assert some.digest() == again.digest()
    assert 200 <= some.tokens < 200 + some.length
    assert len(all_of_them) == 20
    assert all_of_them.take(range(len(some))).digest() == some.digest()
    assert some.digest() != all_of_them.digest()
    assert sum(map(len, hold_out(all_of_them))) == 20


def test_where_an_image_stands_in_a_row(model: Path, tmp_path: Path) -> None:
    sighted.rows(tmp_path, 2)
    one, two = "images/0.png", ["images/0.png", "images/1.png"]
    user = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "a cat"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "in"}, {"type": "image"}, {"type": "image"}]}]
    for row, expected in (
        ({"image": one, "text": "a <image>cat"}, "a []cat"),
        ({"image": two, "text": "<image>a<image>b"}, "[]a[]b"),
        ({"image": one, "text": "a cat"}, "user: []|assistant: a cat|"),
        ({"image": one, "messages": user}, "user: []what?|assistant: a cat|"),
        ({"image": two, "messages": parts}, "user: in[][]|"),
        ({"image": None, "text": "a cat"}, "a cat"),
    ):
        path = lines(tmp_path / "rows.jsonl", {"image": one, "text": "<image>x"}, row)
        found = {said(made) for made in read(model, path).rows}
        assert expected in found, found


def test_only_text_is_said_and_only_text_is_cut(model: Path, tmp_path: Path) -> None:
    sighted.rows(tmp_path, 1)
    path = lines(tmp_path / "rows.jsonl", {"image": "images/0.png", "text": "ab<image>" + "c" * 90})
    whole, cut = read(model, path), read(model, path, length=9)
    assert whole.length == 97
    assert cut.length == 9
    assert cut.rows[0]["attention_mask"].shape == (1, 9)
    assert torch.equal(cut.rows[0]["pixel_values"], whole.rows[0]["pixel_values"])
    (mask,) = cut.said(1)
    assert mask is not None
    assert mask.tolist() == [[True] * 3 + [False] * 4 + [True] * 2]
    path = lines(tmp_path / "rows.jsonl", {"image": "images/0.png", "text": "abcdef<image>"})
    with pytest.raises(UsageError, match=r"rows.jsonl, line 1 has 11 tokens up to the end of its image, more than 9\."):
        read(model, path, length=9)


def test_neighbours_of_one_shape_go_together(model: Path, tmp_path: Path) -> None:
    sighted.rows(tmp_path, 1)
    texts = ["aa", "bb", "cc", "dddd", "ee"]
    path = lines(tmp_path / "rows.jsonl", *({"image": "images/0.png", "text": f"<image>{text}"} for text in texts))
    found = read(model, path)
    order = [said(row) for row in found.rows]
    for size in (1, 2, 9):
        batches = found.batches(size)
        assert [said({"input_ids": ids[None]}) for batch in batches for ids in batch["input_ids"]] == order
        assert all(len(batch["pixel_values"]) == len(batch["input_ids"]) <= size for batch in batches)
        assert len(found.said(size)) == len(batches)
    assert len(found.batches(9)) < 5
    kinds = read(model, lines(tmp_path / "rows.jsonl", {"text": "x"}, {"image": "images/0.png", "text": "y"})).kinds()
    assert ["pixel_values" in kind for kind, *_ in kinds] == [True, False]


def test_rows_that_repeat_themselves(model: Path, tmp_path: Path) -> None:
    sighted.rows(tmp_path, 4)
    others = [{"image": f"images/{k}.png", "text": "the same words of which there are many"} for k in range(4)]
    assert repeated_share(read(model, lines(tmp_path / "a.jsonl", *others))) == 0
    found = read(model, lines(tmp_path / "b.jsonl", *others[:1] * 4))
    assert repeated_share(found) == 0.75
    assert len(hold_out(found)[1]) == 0


def test_what_is_settled(model: Path, tmp_path: Path) -> None:
    skeleton = empty_model(model, json.loads((model / "config.json").read_text()))
    rows = sighted.rows(tmp_path, 2)
    assert settle(Calibration(str(rows)), skeleton, model).image_field == "image"
    assert settle(Calibration(str(rows)), skeleton, model).length == 128 < ROW_LENGTH
    words = lines(tmp_path / "words.jsonl", {"text": "a", "image": None}, {"text": '"image"'})
    assert settle(Calibration(str(words)), skeleton, model).image_field is None
    (tmp_path / "rows.csv").write_text("picture,text\nimages/0.png,a cat\n,a dog\n")
    found = read(model, tmp_path / "rows.csv", image_field="picture")
    assert sorted("pixel_values" in row for row in found.rows) == [False, True]


# --- what cannot be used ----------------------------------------------------------------------------

BAD: dict[str, tuple[str, tuple[str, ...], int]] = {
    "missing": ('{"image": "no.png", "text": "x"}', ("line 2 names the image", "no.png", "no such file"), 2),
    "a folder": ('{"image": "images", "text": "x"}', ("line 2 names the image", "no such file"), 2),
    "no image": ('{"image": "rows.jsonl", "text": "x"}', ("line 2 names", "cannot be read as an image"), 1),
    "above": ('{"image": "../x.png", "text": "x"}', ("line 2 names the image ../x.png, outside the folder",), 2),
    "absolute": ('{"image": "/etc/passwd", "text": "x"}', ("line 2 names the image /etc/passwd, outside",), 2),
    "a link": ('{"image": "link.png", "text": "x"}', ("line 2 names the image link.png, outside the folder",), 2),
    "a number": ('{"image": 3, "text": "x"}', ("line 2 has in 'image' something else than the path",), 2),
    "without text": ('{"image": "images/0.png"}', ("line 2 has no 'text', but image", "--calibration-field"), 2),
    "blank text": ('{"image": "images/0.png", "text": " "}', ("line 2 has an image and no text in 'text'",), 2),
    "two places": ('{"image": "images/0.png", "text": "<image><image>"}', ("line 2 cannot be read by Llava",), 2),
    "messages": ('{"image": "images/0.png", "messages": "x"}', ("line 2 has in 'messages' something else",), 2),
    "no place": (
        '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', ("1 places for images", "and 0 images"), 2
    ),
    "a sound": (
        '{"messages": [{"role": "user", "content": [{"type": "audio"}]}]}', ("neither text nor parts of type",), 2
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_rows_that_cannot_be_used(case: str, model: Path, tmp_path: Path) -> None:
    line, says, code = BAD[case]
    (tmp_path / "in").mkdir()
    path = sighted.rows(tmp_path / "in", 1)
    path.write_text(path.read_text() + line + "\n")
    (tmp_path / "x.png").write_bytes((tmp_path / "in" / "images" / "0.png").read_bytes())
    (tmp_path / "in" / "link.png").symlink_to(tmp_path / "x.png")
    with pytest.raises(LosparseError) as refused:
        read(model, path)
    assert all(text in str(refused.value) for text in (*says, "rows.jsonl, line 2 ")), refused.value
    assert refused.value.exit_code == code


def test_the_command_says_it_in_one_line_and_leaves_nothing(model: Path, tmp_path: Path) -> None:
    path = sighted.rows(tmp_path, 1)
    path.write_text(path.read_text() + '{"image": "no.png", "text": "x"}\n')
    before = sorted(tmp_path.rglob("*"))
    ended = losparse("compress", model, "-o", tmp_path / "out", "--bits", "5", "--calibration", path)
    assert "rows.jsonl, line 2 names the image" in ended.complaint
    assert ended.code == 2
    assert sorted(tmp_path.rglob("*")) == before


def test_a_model_that_reads_no_images(tmp_path: Path) -> None:
    folder = toys.llama(tmp_path / "model", layers=1)
    character_tokenizer().save_pretrained(folder)
    rows = sighted.rows(tmp_path / "rows", 3, alone=(0,))
    ended = losparse("compress", folder, "-o", tmp_path / "out", "--calibration", rows)
    assert ended.code == 2
    assert "LlamaForCausalLM reads no images, and" in ended.complaint
    assert "rows.jsonl, line 2 has one in 'image'" in ended.complaint


def test_a_processor_that_is_not_there(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    character_tokenizer().save_pretrained(tmp_path / "a")
    with pytest.raises(SourceError, match=r"has no processor for images. Copy processor_config.json and"):
        load_processor(tmp_path / "a")
    (tmp_path / "a" / "processor_config.json").write_text("{")
    with pytest.raises(SourceError, match=r"The processor of .* cannot be loaded"):
        load_processor(tmp_path / "a")
    own, rows = builtins.__import__, sighted.rows(tmp_path / "rows", 1)

    def without(name: str, *args: Any, **options: Any) -> Any:
        if name.partition(".")[0] == "PIL":
            raise ImportError(name)
        return own(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"needs the package 'pillow'. Install it with: pip install 'losparse"):
        read(model, rows)
    monkeypatch.undo()

    def needs(*_: Any, **__: Any) -> Any:
        raise ImportError("Qwen2VLVideoProcessor requires the Torchvision library")

    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", needs)
    with pytest.raises(SourceError, match=r"needs the package 'torchvision'.*pip install torchvision"):
        inputs.load_processor(model)
