"""What lies beside the weights goes along, whatever its ending; weights, runs and links that lead out do not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from losparse_cli.checkpoint.companions import companion_files, copy_companions
from losparse_cli.errors import CheckpointError


def write(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(os.urandom(8))
    return folder


def carried(folder: Path) -> set[str]:
    return {str(path) for path in companion_files(folder)}


# huggingface/transformers#9021 and VinAIResearch/PhoBERT#21: merges in bpe.codes.
KEPT = (
    "bpe.codes", "vocab.txt", "prophetnet.tokenizer", "mel_filters.npz", "vocab.pkl", "tekken.json", "source.spm",
    "tokenizer.model.v3", "merges.txt", "qwen.tiktoken", "dict.txt", "spiece", "LICENSE", "modeling_toy.py",
    "generation_config.json", "preprocessor_config.json", "custom_generate/generate.py",
    "custom_generate/requirements.txt", "speaker_embeddings/a.npy",
    "additional_chat_templates/tool.jinja", "1_Pooling/config.json", "2_Dense/model.safetensors", "2_Dense/config.json",
)  # fmt: skip
LEFT = (
    "config.json", "README.md", "model.safetensors", "model.fp16.safetensors", "model.safetensors.index.json",
    "model.safetensors.index.fp16.json", "pytorch_model.bin", "PYTORCH_MODEL.BIN", "tf_model.h5", "toy.gguf",
    "flax_model.msgpack", "optimizer.pt", "rng_state.pth", "training_args.bin", "trainer_state.json", ".env",
    ".git/config", "onnx/model.json", "original/params.json", "checkpoint-20/vocab.txt", "runs/x/events", "unet/a.txt",
    "unet/config.json", "lora/adapter_config.json", "lora/notes.txt", "__pycache__/a.py", "custom_generate/weights.bin",
    "losparse_report.json", "losparse_timing.json", "custom_generate/.secret", "a\x07b.txt",
    "custom_generate/parts/deep.txt",
)  # fmt: skip


def test_all_goes_along_but_weights_runs_and_other_models(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", *KEPT, *LEFT)
    (folder / "modules.json").write_text('[{"path": "1_Pooling"}, {"path": "2_Dense"}]')
    assert carried(folder) == {*KEPT, "modules.json"}
    copy_companions(folder, tmp_path / "out")
    assert all((tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes() for name in KEPT)


def test_a_pickled_vocabulary_is_copied_and_never_opened(tmp_path: Path) -> None:
    trap = f"cos\nsystem\n(S'touch {tmp_path}/opened'\ntR.".encode()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "vocab.pkl").write_bytes(trap)
    copy_companions(tmp_path / "model", tmp_path)
    assert (tmp_path / "vocab.pkl").read_bytes() == trap
    assert not (tmp_path / "opened").exists()


def test_a_data_set_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("losparse_cli.checkpoint.companions.CARRIED_BYTES", 20)
    write(tmp_path, "vocab.txt", "small/a", "small/b", "data/a", "data/b", "data/c")
    (tmp_path / "rows.jsonl").write_bytes(bytes(21))
    assert carried(tmp_path) == {"vocab.txt", "small/a", "small/b"}


# --- links ----------------------------------------------------------------------------------------


def test_a_link_inside_the_folder_or_the_hubs_cache_is_followed(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "1").write_text("tokens")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/1")
    (snapshot / "copy.json").symlink_to("tokenizer.json")
    copy_companions(snapshot, tmp_path)
    assert (tmp_path / "tokenizer.json").read_text() == (tmp_path / "copy.json").read_text() == "tokens"
    assert not (tmp_path / "tokenizer.json").is_symlink()


@pytest.mark.parametrize(
    "name", ["notes.txt", "LICENSE", "1_Pooling/config.json", "custom_generate/generate.py", "vocab.pkl"]
)
def test_a_link_that_leads_out_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    link = tmp_path / "model" / name
    link.parent.mkdir(parents=True)
    (tmp_path / "model" / "modules.json").write_text('[{"path": "1_Pooling"}]')
    link.symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=rf"{link.name} is a link to .*secret, outside"):
        companion_files(tmp_path / "model")


def test_a_folder_that_is_a_link_leads_out_too(tmp_path: Path) -> None:
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key.txt").write_text("secret")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "modules.json").write_text('[{"path": "docs"}]')
    (tmp_path / "model" / "docs").symlink_to(tmp_path / "private")
    with pytest.raises(CheckpointError, match=r"key\.txt is a link"):
        companion_files(tmp_path / "model")
