"""Over HTTP, against a Hub on this machine: upload, download, inspect, and what is said when that fails."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
import yaml
from hub_server import LocalHub
from terminal import Ended, Terminal

TOKEN = "hf_test"
SMALL = ("--rank", "4", "--sparsity", "0.8")
CARD = (
    "---\nlicense: apache-2.0\nlanguage: en\ntags: [toy, text-generation]\npipeline_tag: text-generation\n---\n# Toy\n"
)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    with LocalHub(tmp_path_factory.mktemp("hub"), TOKEN) as hub:
        yield hub


@pytest.fixture(scope="module")
def online(hub: LocalHub) -> Iterator[Terminal]:
    terminal = Terminal({"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN})
    yield terminal
    terminal.close()


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model with a card, a licence file and a tokenizer's file."""
    folder = toys.llama(tmp_path_factory.mktemp("dense") / "toy", shards=2)
    (folder / "README.md").write_text(CARD)
    (folder / "LICENSE").write_text("Apache License")
    (folder / "vocab.json").write_text('{"a": 0}')
    return folder


@pytest.fixture(scope="module")
def compressed(online: Terminal, dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("compressed")
    run(online, "compress", dense, "-o", "small", *SMALL, "--max-shard-size", "60kB", cwd=place)
    assert len(list((place / "small").glob("*.safetensors"))) > 2
    return place / "small"


def run(terminal: Terminal, *arguments: object, **options: Any) -> Ended:
    """A command that must succeed, and must not show the token."""
    ended = terminal.run(*arguments, **options)
    assert ended.code == 0, ended.err
    assert TOKEN not in ended.out + ended.err
    return ended


def card(hub: LocalHub, repository: str) -> dict[str, Any]:
    """The metadata of the repository's README.md."""
    return dict(yaml.safe_load(hub.repositories[repository]["README.md"].read_text().split("---")[1]))


# --- push -----------------------------------------------------------------------------------------


def test_push_uploads_the_folder_in_one_commit(hub: LocalHub, online: Terminal, compressed: Path) -> None:
    folder = shutil.copytree(compressed, compressed.parent / "pushed")
    ended = run(online, "push", folder, "user/small")
    assert f"{hub.endpoint}/user/small" in ended.out
    uploaded = hub.repositories["user/small"]
    assert set(uploaded) - {".gitattributes"} == {path.name for path in folder.iterdir()}
    assert all(uploaded[path.name].read_bytes() == path.read_bytes() for path in folder.iterdir())
    assert sum(name == "user/small" for name, _ in hub.commits) == 2  # creation, and one commit
    assert 'losparse_cli.load("user/small")' in (folder / "README.md").read_text()
    assert 'from_pretrained("user/small", trust_remote_code=True)' in (folder / "README.md").read_text()


def test_a_second_push_deletes_stale_shards(hub: LocalHub, online: Terminal, compressed: Path, tmp_path: Path) -> None:
    run(online, "push", shutil.copytree(compressed, tmp_path / "first"), "user/again")
    mine = ("notes.txt", "images/a.png", "adapter/adapter_model.safetensors", "training_args.bin", "gguf/q4.gguf")
    dense = {"pytorch_model.bin": hub.store(b"old")}
    hub.commit("user/again", hub.repositories["user/again"] | dense | {name: hub.store(b"mine") for name in mine})
    old = {name for name in hub.repositories["user/again"] if name.startswith("model-")}
    run(online, "export", compressed, "--dense", "-o", "plain", cwd=tmp_path)
    run(online, "compress", tmp_path / "plain", "-o", "second", *SMALL, cwd=tmp_path)
    run(online, "push", tmp_path / "second", "user/again")
    found = set(hub.repositories["user/again"])
    assert "model.safetensors" in found
    assert not found & old
    assert not found & {"model.safetensors.index.json", "pytorch_model.bin"}
    assert {*mine, ".gitattributes"} <= found


def test_push_leaves_what_is_not_the_models(hub: LocalHub, online: Terminal, compressed: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(compressed, tmp_path / "small")
    strays = (".env", ".git/config", "sub/.secret", "old.partial/model.safetensors", "losparse_journal.jsonl")
    for name in strays:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("secret")
    run(online, "push", folder, "user/clean")
    assert not set(strays) & set(hub.repositories["user/clean"])


def test_what_an_owner_wrote_on_the_card_stays(
    hub: LocalHub, online: Terminal, compressed: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(compressed, tmp_path / "small")
    with (folder / "README.md").open("a") as file:
        file.write("\n## Results\n\nGood.\n")
    run(online, "push", folder, "user/owned")
    text = hub.repositories["user/owned"]["README.md"].read_text()
    assert text.endswith("\n## Results\n\nGood.\n")
    assert "user/owned" in text


def flip_a_weight(folder: Path) -> None:
    path = max(folder.glob("*.safetensors"))
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def cut_a_shard(folder: Path) -> None:
    path = max(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])


def lose_the_loader(folder: Path) -> None:
    (folder / "losparse_linear.py").unlink()


@pytest.mark.parametrize("harm", [flip_a_weight, cut_a_shard, lose_the_loader])
def test_a_damaged_checkpoint_is_not_pushed(
    harm: Any, hub: LocalHub, online: Terminal, compressed: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(compressed, tmp_path / "small")
    harm(folder)
    asked = len(hub.requests)
    ended = online.run("push", folder, "user/damaged")
    assert str(folder) in ended.complaint
    assert "again" in ended.complaint
    assert ended.code == 1
    assert "user/damaged" not in hub.repositories
    assert len(hub.requests) == asked  # nothing was sent


def test_a_private_repository(hub: LocalHub, online: Terminal, compressed: Path, tmp_path: Path) -> None:
    run(online, "push", shutil.copytree(compressed, tmp_path / "small"), "user/secret", "--private")
    assert "user/secret" in hub.private
    ended = run(online, "inspect", "user/secret", "--json")
    assert json.loads(ended.out)["layers"]
    stranger = online.run("inspect", "user/secret", "--cache-dir", tmp_path / "cache", before=NO_TOKEN)
    assert "hf auth login" in stranger.complaint


def test_private_is_not_promised_of_a_public_repository(
    hub: LocalHub, online: Terminal, compressed: Path, tmp_path: Path
) -> None:
    hub.commit("user/public", {"README.md": hub.store(b"public")})
    ended = online.run("push", shutil.copytree(compressed, tmp_path / "small"), "user/public", "--private")
    assert "user/public exists and is public" in ended.complaint
    assert ended.code == 2
    assert set(hub.repositories["user/public"]) == {"README.md"}


NO_TOKEN = """
import huggingface_hub.utils, huggingface_hub.utils._headers, huggingface_hub
for module in (huggingface_hub, huggingface_hub.utils, huggingface_hub.utils._headers):
    module.get_token = lambda: None
"""


def test_push_without_a_token(hub: LocalHub, online: Terminal, compressed: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(compressed, tmp_path / "small")
    ended = online.run("push", folder, "user/tokenless", before=NO_TOKEN)
    assert "user/tokenless" in ended.complaint
    assert "hf auth login" in ended.complaint
    assert "user/tokenless" not in hub.repositories


def test_push_with_a_wrong_token(hub: LocalHub, online: Terminal, compressed: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(compressed, tmp_path / "small")
    wrong = NO_TOKEN.replace("None", "'hf_wrong'")
    ended = online.run("push", folder, "user/wrong-token", before=wrong)
    assert "user/wrong-token" in ended.complaint
    assert "hf auth login" in ended.complaint
    assert "hf_wrong" not in ended.err
    assert "user/wrong-token" not in hub.repositories


@pytest.mark.parametrize("name", ["a/b/c", "a b", "", "../x", "user/x--y", "https://hub/user/x"])
def test_push_to_a_weird_name(name: str, online: Terminal, compressed: Path, tmp_path: Path) -> None:
    ended = online.run("push", shutil.copytree(compressed, tmp_path / "small"), name)
    assert "Hub id" in ended.complaint


def test_push_of_no_folder(online: Terminal) -> None:
    ended = online.run("push", "absent", "user/x")
    assert "no folder absent" in ended.complaint
    assert ended.code == 2


def test_a_hub_that_fails(hub: LocalHub, online: Terminal, compressed: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(compressed, tmp_path / "small")
    hub.fail_next = 1
    ended = online.run("push", folder, "user/unlucky")
    hub.fail_next = 0
    assert "status 500 for user/unlucky" in ended.complaint
    assert "Try again" in ended.complaint
    run(online, "push", folder, "user/unlucky")


# --- compress from the Hub, and back ------------------------------------------------------------------


@pytest.fixture(scope="module")
def from_hub(hub: LocalHub, online: Terminal, dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`compress user/toy --push-to-hub user/toy-small`, in a folder of its own; returns the result."""
    commit = hub.add_folder("user/toy", dense)
    place = tmp_path_factory.mktemp("from-hub")
    ended = run(online, "compress", "user/toy", *SMALL, "--push-to-hub", "user/toy-small", "--json", cwd=place)
    shown = json.loads(ended.out)
    assert shown["repository"] == f"{hub.endpoint}/user/toy-small"
    assert shown["output"] == str(place / "toy-losparse")
    report = json.loads((place / "toy-losparse" / "losparse_report.json").read_text())
    assert report["source"]["commit"] == commit
    return place / "toy-losparse"


def test_a_hub_model_is_the_base_of_its_card(hub: LocalHub, from_hub: Path) -> None:
    found = card(hub, "user/toy-small")
    assert found["base_model"] == "user/toy"
    assert found["base_model_relation"] == "quantized"
    assert found["library_name"] == "transformers"
    assert found["license"] == "apache-2.0"
    assert found["language"] == "en"
    assert found["pipeline_tag"] == "text-generation"
    assert {"losparse", "toy", "text-generation"} <= set(found["tags"])
    assert {"LICENSE", "vocab.json"} <= set(hub.repositories["user/toy-small"])


def test_a_folder_is_nobodys_base(compressed: Path) -> None:
    found = yaml.safe_load((compressed / "README.md").read_text().split("---")[1])
    assert "base_model" not in found
    assert "base_model_relation" not in found
    assert found["license"] == "apache-2.0"


def test_where_the_base_has_no_licence_none_is_claimed(
    hub: LocalHub, online: Terminal, dense: Path, tmp_path: Path
) -> None:
    bare = shutil.copytree(dense, tmp_path / "bare")
    (bare / "README.md").unlink()
    (bare / "LICENSE").unlink()
    hub.add_folder("user/bare", bare)
    run(online, "compress", "user/bare", *SMALL, "--push-to-hub", "user/bare-small", cwd=tmp_path)
    assert not [key for key in card(hub, "user/bare-small") if key.startswith("license")]
    assert not [name for name in hub.repositories["user/bare-small"] if "LICENSE" in name]


def test_hub_and_folder_give_the_same_weights(from_hub: Path, compressed: Path) -> None:
    assert toys.tensor_bytes(from_hub) == toys.tensor_bytes(compressed)


def test_a_base_from_the_hub_is_hashed_by_its_blobs(from_hub: Path, dense: Path) -> None:
    import hashlib

    recorded = json.loads((from_hub / "losparse_report.json").read_text())["source"]["files"]
    for path in dense.glob("*.safetensors"):
        assert recorded[path.name]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert recorded[path.name]["size"] == path.stat().st_size


def test_the_token_is_written_nowhere(from_hub: Path, hub: LocalHub) -> None:
    written = [path for path in from_hub.parent.rglob("*") if path.is_file()]
    assert len(written) > 8
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]
    assert not [
        path for path, blob in hub.repositories["user/toy-small"].items() if TOKEN.encode() in blob.read_bytes()
    ]


PULL = """
import sys
import torch, transformers
if sys.argv[2] == "register":
    import losparse_cli
    losparse_cli.register()
    model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
else:
    sys.modules["losparse_cli"] = None  # as where the package is not installed
    model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert any(type(m).__name__ == "LowRankSparseLinear" for m in model.modules())
with torch.no_grad():
    torch.save(model(torch.arange(12)[None]).logits, sys.argv[3])
raise SystemExit
"""


@pytest.mark.parametrize("way", ["register", "trust_remote_code"])
def test_pull_gives_the_model_that_was_pushed(way: str, from_hub: Path, online: Terminal, tmp_path: Path) -> None:
    for name, source in (("pulled", "user/toy-small"), ("local", from_hub)):
        ended = online.run(source, way, tmp_path / name, before=PULL)
        assert ended.code == 0, ended.err
        assert TOKEN not in ended.out + ended.err
    pulled, local = torch.load(tmp_path / "pulled"), torch.load(tmp_path / "local")
    assert torch.isfinite(pulled).all()
    assert torch.equal(pulled, local)


# --- inspect ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["user/toy", "user/toy-small"])
def test_inspect_fetches_headers_only(
    name: str, from_hub: Path, hub: LocalHub, online: Terminal, tmp_path: Path
) -> None:
    asked = len(hub.requests)
    ended = run(online, "inspect", name, "--json", "--cache-dir", tmp_path / "cache")
    fetched = [
        (path.rpartition("/")[2], extent)
        for method, path, extent in hub.requests[asked:]
        if method == "GET" and "/resolve/" in path
    ]
    weights = [(file, extent) for file, extent in fetched if file.endswith(".safetensors")]
    assert {file for file, _ in weights} == {file for file in hub.repositories[name] if file.endswith(".safetensors")}
    for file, extent in weights:
        assert extent is not None
        first, last = extent.removeprefix("bytes=").split("-")
        assert int(last) - int(first) + 1 < hub.repositories[name][file].stat().st_size
    allowed = {"config.json", "losparse_report.json", "model.safetensors.index.json"}
    others = {file for file, _ in fetched if not file.endswith((".safetensors", ".py"))}
    assert others <= allowed
    assert len([layer for layer in json.loads(ended.out)["layers"] if not layer.get("reason")]) == 28


@pytest.mark.parametrize("request_", [("--dry-run",), ("--targets", "*.nothing"), ("--rank", "5000")])
def test_a_plan_downloads_no_weights(
    request_: tuple[str, ...], from_hub: Path, hub: LocalHub, online: Terminal, tmp_path: Path
) -> None:
    asked = len(hub.requests)
    ended = online.run("compress", "user/toy", *request_, "--cache-dir", tmp_path / "cache", cwd=tmp_path)
    assert ended.code == (0 if request_ == ("--dry-run",) else 2)
    assert not [
        path for m, path, extent in hub.requests[asked:] if m == "GET" and path.endswith(".safetensors") and not extent
    ]
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_size_holds_the_files_that_are_downloaded_later(from_hub: Path, online: Terminal, tmp_path: Path) -> None:
    command = ("compress", "user/toy", "--size", "350kB", "--cache-dir", tmp_path / "cache", "-o", "out")
    planned = run(online, *command, "--dry-run", cwd=tmp_path)
    assert "--size 350kB holds the files beside the weights, too" in planned.err
    run(online, *command, cwd=tmp_path)
    assert sum(path.stat().st_size for path in (tmp_path / "out").iterdir()) <= 350_000


def test_a_cached_model_is_compressed_offline(from_hub: Path, online: Terminal, tmp_path: Path) -> None:
    offline = "import huggingface_hub.constants as constants\nconstants.HF_HUB_OFFLINE = True\n"
    ended = online.run("compress", "user/toy", "--rank", "4", "--sparsity", "0.8", cwd=tmp_path, before=offline)
    assert ended.code == 0, ended.err
    refused = online.run("compress", "user/never-seen", cwd=tmp_path, before=offline)
    assert "the Hub is not asked while HF_HUB_OFFLINE is set" in refused.complaint


def test_inspect_says_the_same_of_hub_and_folder(from_hub: Path, online: Terminal) -> None:
    remote = json.loads(run(online, "inspect", "user/toy-small", "--json").out)
    local = json.loads(run(online, "inspect", from_hub, "--json").out)
    assert remote.pop("name") != local.pop("name")  # which is what it was asked by
    assert remote == local


def test_spectra_of_a_hub_model_need_the_weights(hub: LocalHub, online: Terminal, dense: Path) -> None:
    hub.add_folder("user/toy", dense)
    ended = online.run("inspect", "user/toy", "--spectrum")
    assert "hf download user/toy" in ended.complaint


@pytest.mark.parametrize("name", ["user/toy-small", "folder"])
def test_verify_and_export_of_a_hub_model(name: str, from_hub: Path, online: Terminal, tmp_path: Path) -> None:
    source = from_hub if name == "folder" else name
    assert json.loads(run(online, "verify", source, "--json").out)["hashed"] >= 5
    run(online, "export", source, "--dense", "-o", "dense", cwd=tmp_path)
    assert len(toys.tensor_bytes(tmp_path / "dense")) == 38
    found = yaml.safe_load((tmp_path / "dense" / "README.md").read_text().split("---")[1])
    assert (found["license"], found["base_model"]) == ("apache-2.0", "user/toy")


# --- what goes wrong ----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["compress", "inspect", "verify", "export"])
def test_a_model_that_does_not_exist(command: str, online: Terminal, tmp_path: Path) -> None:
    more = ("--dense", "-o", "out") if command == "export" else ()
    ended = online.run(command, "user/absent", *more, cwd=tmp_path)
    assert "user/absent" in ended.complaint
    assert "Check the spelling" in ended.complaint
    assert "hf auth login" in ended.complaint
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["compress", "inspect"])
def test_a_gated_model(command: str, hub: LocalHub, online: Terminal, dense: Path, tmp_path: Path) -> None:
    hub.add_folder("user/gated", dense)
    hub.gated.add("user/gated")
    ended = online.run(command, "user/gated", cwd=tmp_path)
    assert "user/gated is gated" in ended.complaint
    assert "hf auth login" in ended.complaint
    assert not list(tmp_path.iterdir())


def test_a_revision_that_does_not_exist(hub: LocalHub, online: Terminal, dense: Path, tmp_path: Path) -> None:
    hub.add_folder("user/toy", dense)
    ended = online.run("compress", "user/toy", "--revision", "v9", cwd=tmp_path)
    assert "user/toy has no such revision" in ended.complaint
    assert "--revision" in ended.complaint


def test_a_cache_that_cannot_be_written(hub: LocalHub, online: Terminal, dense: Path, tmp_path: Path) -> None:
    hub.add_folder("user/toy", dense)
    (tmp_path / "cache").write_text("a file")
    ended = online.run("compress", "user/toy", "--cache-dir", "cache", cwd=tmp_path)
    complaint = ended.err.splitlines()[-1]  # the Hub's own library warns before
    assert ended.code == 1
    assert str(tmp_path / "cache") in complaint
    assert "--cache-dir" in complaint
    assert "Traceback" not in ended.err


def test_a_repository_without_safetensors(hub: LocalHub, online: Terminal, dense: Path, tmp_path: Path) -> None:
    pickled = shutil.copytree(dense, tmp_path / "pickled", ignore=shutil.ignore_patterns("*.safetensors*"))
    torch.save(toys.weights(), pickled / "pytorch_model.bin")
    hub.add_folder("user/pickled", pickled)
    ended = online.run("inspect", "user/pickled")
    assert "hf download user/pickled" in ended.complaint
    run(online, "compress", "user/pickled", "-o", "out", *SMALL, cwd=tmp_path)
    run(online, "verify", "out", cwd=tmp_path)


def test_a_repository_with_a_corrupt_header(hub: LocalHub, online: Terminal, dense: Path, tmp_path: Path) -> None:
    bad = shutil.copytree(dense, tmp_path / "bad")
    for path in bad.glob("*.safetensors"):
        toys.raw_safetensors(path, {"a": {"dtype": "F31", "shape": [1], "data_offsets": [0, 4]}}, bytes(4))
    hub.add_folder("user/bad", bad)
    for command in ("inspect", "compress"):
        ended = online.run(command, "user/bad", cwd=tmp_path)
        assert ended.code == 1
        assert "F31" in ended.complaint
    assert not (tmp_path / "bad-losparse").exists()


def test_quiet_is_quiet_over_the_network(hub: LocalHub, online: Terminal, dense: Path, tmp_path: Path) -> None:
    hub.add_folder("user/hushed", dense)
    ended = run(
        online, "compress", "user/hushed", *SMALL, "--push-to-hub", "user/hushed-small", "--quiet",
        "--cache-dir", "cache", cwd=tmp_path,
    )  # fmt: skip
    assert ended.out == ""
    assert ended.err == ""
