"""Sources of calibration text, the windows they are cut into, and what is refused before the long work."""

from __future__ import annotations

import csv
import importlib.util
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from conftest import LENGTH, character_tokenizer, toy_model
from terminal import Ended, done, losparse
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from losparse_cli.errors import MissingExtraError, SourceError, UsageError
from losparse_cli.text import documents as sources
from losparse_cli.text import windows as cutting
from losparse_cli.text.documents import Documents, kind_of, read_documents
from losparse_cli.text.windows import Calibration, Windows, pack, pack_pairs, read_windows, settle

START, END = 1, 2
ROWS = [f"Row {k}: " + " ".join(f"{k}x{j}" for j in range(20 + k)) for k in range(30)]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return character_tokenizer()


def framing_tokenizer() -> Any:
    """As an encoder has it: a token before the text, and one after."""
    from tokenizers import processors

    made = character_tokenizer()
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", START), ("</s>", END)]
    )
    return made


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path: Path, columns: dict[str, Any]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path)
    return path


def text_of(tokenizer: Any, ids: Any) -> str:
    return str(tokenizer.decode([int(i) for i in ids], skip_special_tokens=True))


# --- packing --------------------------------------------------------------------------------------


def test_windows_of_one_document_are_disjoint_parts_of_it(tokenizer: Any) -> None:
    document = "".join(chr(33 + k % 90) for k in range(1000))
    ids = pack(tokenizer, [document], length=20, tokens=400, seed=3, close=False)
    assert ids.shape == (20, 20)
    assert ids.dtype == torch.int64
    assert (ids[:, 0] == START).all()
    places = [row[1:].tolist() for row in ids]
    whole = tokenizer(document, add_special_tokens=False).input_ids
    cut = [whole[k : k + 19] for k in range(0, 988, 19)]
    chosen = torch.randperm(1000 // 19, generator=torch.Generator().manual_seed(3))[:20].sort().values
    assert places == [cut[k] for k in chosen]  # as it has been from the first version on


def test_an_encoders_windows_begin_and_end_as_its_texts(tokenizer: Any) -> None:
    ids = pack(framing_tokenizer(), ["abc " * 100], length=16, tokens=64, seed=0, close=True)
    assert (ids[:, 0] == START).all()
    assert (ids[:, -1] == END).all()
    open_ended = pack(framing_tokenizer(), ["abc " * 100], length=16, tokens=64, seed=0, close=False)
    assert not (open_ended == END).any()


@pytest.mark.parametrize("length", [8, 17, 48])
def test_documents_are_joined_by_a_blank_line_in_an_order_drawn_by_the_seed(tokenizer: Any, length: int) -> None:
    rows = [row.replace("\n", " ") for row in ROWS]
    ids = pack(tokenizer, rows, length=length, tokens=10**6, seed=5, close=False)
    joined = "".join(text_of(tokenizer, row[1:]) for row in ids)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(5)).tolist()
    # The toy tokenizer knows no line end: a gap is two unknown tokens, left out when decoded.
    assert "".join(rows[k] for k in order).startswith(joined)
    assert (ids == 3).sum() == 2 * (len(rows) - 1)


def test_no_more_documents_are_tokenized_than_are_needed(tokenizer: Any) -> None:
    seen: list[str] = []

    class Counting:
        def __call__(self, text: str, **options: Any) -> Any:
            seen.append(text)
            return tokenizer(text, **options)

    ids = pack(Counting(), ROWS * 100, length=20, tokens=1000, seed=0, close=False)
    assert ids.shape == (50, 20)
    assert len(seen) < 20


def test_a_draw_is_reproducible_without_repetition_and_leaves_the_generator_alone(tokenizer: Any) -> None:
    document = " ".join(map(str, range(2000)))
    before = torch.random.get_rng_state()
    one, two, other = (pack(tokenizer, [document], length=24, tokens=960, seed=s, close=False) for s in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert len({tuple(row.tolist()) for row in one}) == len(one) == 40


def test_of_a_long_text_pieces_from_everywhere_are_taken(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutting, "LONG", 10_000)
    text = " ".join(f"{k:05d}" for k in range(20_000))
    pieces = list(cutting._pieces([text], 32))
    assert " ".join(pieces) == text
    assert max(map(len, pieces)) <= 8 * 32
    ids = pack(tokenizer, pieces, length=32, tokens=12800, seed=0, close=False)
    tenths = {int(word) // 2000 for row in ids for word in text_of(tokenizer, row).split() if len(word) == 5}
    assert tenths == set(range(10))
    assert list(cutting._pieces(["x" * 20_000], 32)) == ["x" * 256] * 78 + ["x" * 32]


def test_too_little_text(tokenizer: Any) -> None:
    with pytest.raises(UsageError, match=r"has 5 tokens, fewer than one window of 32.*lower --calibration-length"):
        pack(tokenizer, ["abcde"], length=32, tokens=320, seed=0, close=False)


def test_targets_lie_beside_their_texts(tokenizer: Any) -> None:
    texts = [f"{k % 10}" * (30 + 3 * k) for k in range(40)]
    targets = [f"{k % 10}" * (10 + k) for k in range(40)]
    ids, target_ids = pack_pairs(tokenizer, Documents(texts, targets), length=25, tokens=1000, seed=1)
    assert ids.shape == (40, 25)
    assert target_ids.shape[0] == 40
    assert 5 < target_ids.shape[1] <= 25
    aligned = [text_of(tokenizer, a)[0] in text_of(tokenizer, b) for a, b in zip(ids, target_ids, strict=True)]
    assert sum(aligned) >= 38  # the last ones may have to begin earlier


def test_a_decoder_reads_its_text_shifted(toy: Callable[..., Path]) -> None:
    model, folder = toy_model("bart"), toy("bart", tokenizer=True)
    calibration = settle(Calibration(str(Path(__file__))), model, folder)
    windows = read_windows(calibration, model, folder, 0)
    assert windows is not None
    assert windows.target_ids is not None
    assert (windows.target_ids[:, 0] == 2).all()  # decoder_start_token_id
    assert torch.equal(windows.target_ids[:, 1:], windows.ids[:, :-1])
    assert windows.tokens == 2 * windows.ids.numel()
    assert [set(batch) for batch in windows.batches(1000)] == [{"input_ids", "decoder_input_ids"}]


def test_a_decoder_without_a_first_token(toy: Callable[..., Path], tmp_path: Path) -> None:
    model = toy_model("t5")
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = None
    (tmp_path / "text.txt").write_text("abc " * 500)
    calibration = settle(Calibration(str(tmp_path / "text.txt"), length=32), model, tmp_path)
    with pytest.raises(UsageError, match="Add decoder_start_token_id"):
        read_windows(calibration, model, toy("t5", tokenizer=True), 0)


# --- sources --------------------------------------------------------------------------------------


def windows_of(source: Path, folder: Path, **options: Any) -> Windows:
    calibration = settle(Calibration(str(source), **{"tokens": 2000, **options}), toy_model("llama"), folder)
    windows = read_windows(calibration, toy_model("llama"), folder, 7)
    assert windows is not None
    return windows


def test_sources_of_the_same_documents_give_the_same_windows(toy: Callable[..., Path], tmp_path: Path) -> None:
    folder = toy("llama", tokenizer=True)
    lines = windows_of(write_lines(tmp_path / "a.jsonl", [{"id": 1, "text": row} for row in ROWS]), folder)
    assert lines.ids.shape == (round(2000 / LENGTH), LENGTH)
    named = windows_of(write_lines(tmp_path / "b.json", [{"body": row} for row in ROWS]), folder, field="body")
    assert torch.equal(lines.ids, named.ids)
    for suffix, delimiter in (("csv", ","), ("tsv", "\t")):
        with open(tmp_path / f"a.{suffix}", "w", newline="", encoding="utf-8") as file:
            csv.writer(file, delimiter=delimiter).writerows([("id", "text"), *enumerate(ROWS)])
        assert torch.equal(lines.ids, windows_of(tmp_path / f"a.{suffix}", folder).ids)
    if importlib.util.find_spec("pyarrow"):
        parquet = windows_of(write_parquet(tmp_path / "a.parquet", {"text": ROWS, "n": range(30)}), folder)
        assert torch.equal(lines.ids, parquet.ids)


def test_a_text_is_a_document_whatever_its_suffix_and_line_ends(toy: Callable[..., Path], tmp_path: Path) -> None:
    folder, text = toy("llama", tokenizer=True), "\n".join(ROWS)
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "b.cor").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    write_lines(tmp_path / "c.jsonl", [{"text": text}])
    found = [windows_of(tmp_path / name, folder).digest() for name in ("a.txt", "b.cor", "c.jsonl")]
    assert len(set(found)) == 1


def test_blank_rows_and_rows_of_nothing_are_left_out(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": "one"}, {"text": " \n"}, {"text": None}, {"text": "two"}])
    path.write_text(path.read_text() + "\n\n")
    assert read_documents(str(path)) == Documents(["one", "two"])


def test_of_a_large_source_only_the_beginning_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LIMIT", 1001)
    (tmp_path / "a.txt").write_text("é" * 2000, encoding="utf-8")
    assert read_documents(str(tmp_path / "a.txt")).texts == ["é" * 500]  # not half of a letter
    path = write_lines(tmp_path / "a.jsonl", [{"text": "x" * 100}] * 50)
    path.write_text(path.read_text() + "what comes after is not looked at")
    assert len(read_documents(str(path)).texts) == 11
    monkeypatch.setattr("losparse_cli.text.files.PIECE", 512)
    table = tmp_path / "a.csv"
    table.write_bytes(b"text\r\n" + (b"x" * 100 + b"\r\n") * 50 + b"what comes after, is not, looked at")
    assert read_documents(str(table)).texts == ["x" * 100] * 11


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("self", "self"),
        ("user/name", "hub"),
        ("user/name:config-1.0", "hub"),
        ("user/name-v1.5", "hub"),
        (__file__, "text"),
    ],
)
def test_what_a_source_is(source: str, kind: str) -> None:
    assert kind_of(source) == kind


def test_an_array_of_objects_is_read_as_lines_are(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": row, "id": k} for k, row in enumerate(ROWS)], indent=2))
    assert read_documents(str(path)).texts == ROWS
    with pytest.raises(UsageError, match=r"a\.json, row 1 has no 'body', but text, id"):
        read_documents(str(path), field="body")


def test_an_array_on_one_line_may_be_longer_than_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "grün"}] * 3, ensure_ascii=False), encoding="utf-8")
    cut = path.read_bytes().index("ü".encode()) + 1  # through the letter
    monkeypatch.setattr("losparse_cli.text.files.LIMIT", cut)
    assert read_documents(str(path)).texts == ["grün"] * 3


def test_a_file_comes_before_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "user").mkdir()
    (tmp_path / "user" / "name").write_text("a file")
    monkeypatch.chdir(tmp_path)
    assert read_documents("user/name").texts == ["a file"]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """A Hub of one dataset, user/rows, that lies in a folder; the calls that reached it."""
    datasets = pytest.importorskip("datasets")
    load, calls = datasets.load_dataset, []
    (tmp_path / "rows").mkdir()
    write_lines(tmp_path / "rows" / "train.jsonl", [{"text": row, "label": k} for k, row in enumerate(ROWS)])
    write_lines(tmp_path / "rows" / "test.jsonl", [{"text": "test " + row, "label": 0} for row in ROWS])

    def load_dataset(name: str, config: str | None = None, **options: Any) -> Any:
        calls.append({"name": name, "config": config, **options})
        return load(str(tmp_path / "rows"), **options)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_a_dataset_is_streamed(hub: list[dict[str, Any]], toy: Callable[..., Path], tmp_path: Path) -> None:
    assert read_documents("user/rows:small").texts == ROWS
    assert hub == [{"name": "user/rows", "config": "small", "split": "train", "streaming": True}]
    assert read_documents("user/rows", split="test").texts[0] == "test " + ROWS[0]
    folder = toy("llama", tokenizer=True)
    model = toy_model("llama")
    calibration = settle(Calibration("user/rows", tokens=2000), model, folder)
    assert (calibration.split, calibration.field) == ("train", "text")
    windows = read_windows(calibration, model, folder, 7)
    assert windows is not None
    same = windows_of(write_lines(tmp_path / "a.jsonl", [{"text": row} for row in ROWS]), folder)
    assert windows.digest() == same.digest()


def test_a_dataset_without_the_split_or_the_field(hub: list[dict[str, Any]]) -> None:
    with pytest.raises(UsageError, match=r"split 'dev'.*--calibration-split"):
        read_documents("user/rows", split="dev")
    with pytest.raises(UsageError, match=r"user/rows has no 'body', but text, label.*--calibration-field"):
        read_documents("user/rows", field="body")
    with pytest.raises(UsageError, match=r"'label' of user/rows holds a number"):
        read_documents("user/rows", field="label")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ConnectionError("offline"), "the Hub cannot be reached"),
        (RuntimeError("scripts are no longer supported"), "cannot be read: scripts are no longer supported"),
    ],
)
def test_a_dataset_that_cannot_be_read(error: Exception, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def fail(*arguments: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(SourceError, match=says):
        read_documents("user/rows")


def test_a_dataset_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def fail(*arguments: Any, **options: Any) -> Any:
        raise datasets.exceptions.DatasetNotFoundError("no such thing")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(SourceError, match=r"no file user/rows, and no dataset of that name.*hf auth login"):
        read_documents("user/rows")


@pytest.mark.parametrize("package", ["datasets", "pyarrow"])
def test_a_package_that_is_not_installed(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(MissingExtraError, match=rf"'{package}'.*pip install 'losparse\[datasets\]'"):
        read_documents("user/rows" if package == "datasets" else str(tmp_path / "a.parquet"))


# --- the request and the model --------------------------------------------------------------------


def test_a_length_left_open_is_what_the_model_takes(toy: Callable[..., Path], tmp_path: Path) -> None:
    folder = toy("llama", tokenizer=True)
    assert settle(Calibration(__file__), toy_model("llama"), folder).length == LENGTH
    assert settle(Calibration(__file__), toy_model("gpt2"), folder).length == LENGTH
    assert settle(Calibration(__file__), toy_model("mamba"), folder).length == 512
    assert settle(Calibration(__file__, length=700), toy_model("mamba"), folder).length == 700
    toys.write_json(tmp_path / "tokenizer_config.json", {"model_max_length": 20})
    assert settle(Calibration(__file__), toy_model("llama"), tmp_path).length == 20
    with pytest.raises(UsageError, match=r"LlamaForCausalLM takes at most 20 tokens, fewer than.* 21"):
        settle(Calibration(__file__, length=21), toy_model("llama"), tmp_path)


def test_what_is_recorded(toy: Callable[..., Path], tmp_path: Path) -> None:
    folder = toy("llama", tokenizer=True)
    text = settle(Calibration(__file__, tokens=100), toy_model("llama"), folder)
    assert asdict(text) == {
        "source": __file__, "tokens": 100, "length": LENGTH, "batch": 4, "split": None, "field": None,
        "target_field": None, "image_field": None,
    }  # fmt: skip
    for name in ("a.jsonl", "a.csv"):
        rows = settle(Calibration(str(write_lines(tmp_path / name, []))), toy_model("llama"), folder)
        assert (rows.split, rows.field) == (None, "text")


def test_a_model_that_reads_no_text(tmp_path: Path) -> None:
    import transformers

    config = transformers.ViTConfig(
        hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=14, image_size=8, patch_size=4
    )
    with pytest.raises(UsageError, match=r"ViTModel reads pixel_values, not text. Compress it"):
        settle(Calibration(__file__), transformers.ViTModel(config), tmp_path)


@pytest.mark.parametrize("name", ["bert", "t5", "bart"])
def test_only_a_language_model_writes_its_own_text(name: str, toy: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match=r"writes no text of its own.*Give a file"):
        settle(Calibration("self"), toy_model(name), toy(name))


def test_options_that_say_nothing_about_the_source(toy: Callable[..., Path], tmp_path: Path) -> None:
    model, folder = toy_model("llama"), toy("llama", tokenizer=True)
    lines = str(write_lines(tmp_path / "a.jsonl", []))
    for source, option in (
        (__file__, {"field": "body"}), (__file__, {"split": "test"}), (lines, {"split": "test"}),
        ("self", {"field": "text"}), (lines, {"target_field": "summary"}),
    ):  # fmt: skip
        with pytest.raises(
            UsageError, match=f"has no .*Leave out --calibration-{next(iter(option)).partition('_')[0]}"
        ):
            settle(Calibration(source, **option), model, folder)  # type: ignore[arg-type]


def test_a_tokenizer_of_another_model(toy: Callable[..., Path]) -> None:
    model = toy_model("llama", vocab_size=60)
    folder = toy("llama", tokenizer=True)
    with pytest.raises(UsageError, match=r"yields token \d+, and the model knows 60"):
        read_windows(settle(Calibration(__file__), model, folder), model, folder, 0)


# --- the command ----------------------------------------------------------------------------------

SMALL = ("--rank", "4", "--sparsity", "0.8", "--solver", "oats", "--iterations", "1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = toys.llama(tmp_path_factory.mktemp("models") / "model", layers=1, vocab_size=101)
    toys.llama(folder, layers=1, extra={"model.embed_tokens.weight": torch.randn(101, 64)}, vocab_size=101)
    character_tokenizer().save_pretrained(folder)
    return folder


def refused(place: Path, model: Path, *arguments: object, says: tuple[str, ...], code: int) -> Ended:
    before = sorted(place.rglob("*"))
    ended = losparse("compress", model, "-o", "out", *SMALL, "--calibration", *arguments, cwd=place)
    complaint = ended.complaint
    assert all(text in complaint for text in says), complaint
    assert ended.code == code, complaint
    assert sorted(place.rglob("*")) == before
    return ended


BAD_FILES: dict[str, tuple[str, bytes, tuple[str, ...], int]] = {
    "empty": ("a.txt", b"", ("a.txt is empty", "Give a file with text"), 2),
    "blank": ("a.txt", b" \n\n\t", ("a.txt is empty",), 2),
    "too short": ("a.txt", b"a few words", ("11 tokens, fewer than one window of 64", "--calibration-length"), 2),
    "not UTF-8": ("a.txt", "grün".encode("latin-1") * 100, ("a.txt is not UTF-8 text (at byte 2)", "Convert"), 1),
    "NUL bytes": ("a.txt", b"text\0" * 100, ("a.txt holds NUL bytes",), 1),
    "cut through a letter": ("a.txt", b"ab" * 99 + b"\xc3", ("a.txt is not UTF-8",), 1),
    "broken line": ("a.jsonl", b'{"text": "a"}\n{"text": \n', ("a.jsonl, line 2 is not valid JSON", "one object"), 1),
    "binary lines": ("a.jsonl", b'{"text": "a"}\n\xff\xfe\n', ("a.jsonl, line 2 is not UTF-8",), 1),
    "a list": ("a.json", b"[1, 2]\n", ("a.json, row 1 is no JSON object",), 1),
    "nested too deep": ("a.json", b"[" * 100_000, ("a.json is not valid JSON",), 1),
    "missing field": (
        "a.jsonl", b'{"id": 1, "body": "x"}\n', ("line 1 has no 'text', but id, body", "--calibration-field"), 2
    ),
    "nested field": ("a.jsonl", b'{"text": ["x"]}\n', ("'text' of", "line 1 holds a list, not text"), 2),
    "no rows": ("a.jsonl", b"", ("a.jsonl holds no text in the field 'text'",), 2),
    "no Parquet": ("a.parquet", b"PAR1 or not", ("a.parquet cannot be read as Parquet", "download it again"), 1),
    "empty Parquet": ("a.parquet", b"", ("a.parquet cannot be read as Parquet",), 1),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_refused(case: str, model: Path, tmp_path: Path) -> None:
    name, content, says, code = BAD_FILES[case]
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    refused(tmp_path, model, name, says=says, code=code)


@pytest.mark.slow
def test_parquet_without_the_column_or_with_lists_or_damage(model: Path, tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", {"body": ROWS, "tags": [["x"]] * 30})
    refused(tmp_path, model, "a.parquet", says=("row 1 has no 'text', but body, tags", "--calibration-field"), code=2)
    refused(tmp_path, model, "a.parquet", "--calibration-field", "tags", says=("holds a list, not text",), code=2)
    raw = bytearray((tmp_path / "a.parquet").read_bytes())
    raw[4:60] = bytes(56)
    (tmp_path / "b.parquet").write_bytes(raw)
    refused(tmp_path, model, "b.parquet", "--calibration-field", "body", says=("b.parquet cannot be read",), code=1)


BAD_REQUESTS: dict[str, tuple[tuple[str, ...], tuple[str, ...], int]] = {
    "missing file": (("absent.txt",), ("There is no file absent.txt", "user/name", "self"), 2),
    "missing file in a folder": (("texts/absent.jsonl",), ("There is no file texts/absent.jsonl",), 2),
    "neither file nor id": (("what is this?",), ("There is no file what is this?",), 2),
    "empty name": (("",), ("is a folder",), 2),
    "folder": ((".",), ("is a folder. Give a file in it",), 2),
    "no tokens": (("self", "--calibration-tokens", "0"), ("--calibration-tokens", "not 0"), 2),
    "fewer than no tokens": (("self", "--calibration-tokens", "-5"), ("--calibration-tokens", "not -5"), 2),
    "short windows": (
        ("self", "--calibration-length", "7"),
        ("--calibration-length is a whole number, 8 or more", "not 7"),
        2,
    ),
    "long windows": (("self", "--calibration-length", "65"), ("at most 64 tokens", "Give 64 or less"), 2),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_a_bad_request_is_refused(case: str, model: Path, tmp_path: Path) -> None:
    arguments, says, code = BAD_REQUESTS[case]
    refused(tmp_path, model, *arguments, says=says, code=code)


@pytest.mark.slow
def test_a_dataset_offline(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    refused(tmp_path, model, "user/absent", says=("no file user/absent", "Hub cannot be reached"), code=1)


def test_options_without_calibration(model: Path, tmp_path: Path) -> None:
    ended = losparse("compress", model, "-o", "out", "--calibration-field", "body", cwd=tmp_path)
    assert "--calibration-field says how to use calibration text: add --calibration SOURCE" in ended.complaint


def test_a_model_without_a_tokenizer(model: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(model, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    (tmp_path / "a.txt").write_text("text " * 100)
    refused(
        tmp_path,
        bare,
        "a.txt",
        says=("bare has no tokenizer", "Copy the tokenizer files"),
        code=1,
    )
    (bare / "tokenizer.json").write_text("{}")
    refused(tmp_path, bare, "a.txt", says=("The tokenizer of", "cannot be loaded"), code=1)
    unknown = Tokenizer(models.WordLevel({"a": 0}, unk_token="<unk>"))  # which its vocabulary lacks
    PreTrainedTokenizerFast(tokenizer_object=unknown).save_pretrained(bare)
    refused(tmp_path, bare, "a.txt", says=("bare cannot read text", "[UNK]", "Download it again"), code=1)


def test_text_in_another_script_is_fine(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(
        "Съешь ещё этих мягких французских булок. 日本語のテキスト。" * 50, encoding="utf-8"
    )
    done("compress", model, "-o", "out", *SMALL, "--calibration", "a.txt", "--calibration-tokens", "256", cwd=tmp_path)
    report = json.loads((tmp_path / "out" / "losparse_report.json").read_text())
    assert report["calibration"]["tokens_used"] == 256
    assert report["calibration"]["length"] == 64


@pytest.mark.slow
def test_targets_by_the_command(toy: Callable[..., Path], tmp_path: Path) -> None:
    model = toy("t5", tokenizer=True)
    write_lines(tmp_path / "a.jsonl", [{"text": row, "summary": row[:30]} for row in ROWS])
    options = ("--calibration-tokens", "256", "--calibration-length", "32", "--calibration-target-field", "summary")
    done("compress", model, "-o", "out", *SMALL, "--calibration", "a.jsonl", *options, cwd=tmp_path)
    found = json.loads((tmp_path / "out" / "losparse_report.json").read_text())["calibration"]
    assert (found["field"], found["target_field"], found["windows"]) == ("text", "summary", 8)
    assert 256 < found["tokens_used"] < 512  # summaries are shorter
