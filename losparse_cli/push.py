"""Verify, address the card, upload once."""

from __future__ import annotations

from pathlib import Path

from .checkpoint.card import address_card
from .checkpoint.source import hub_errors, open_checkpoint
from .checkpoint.writer import write_errors
from .errors import UsageError
from .verify import require_sound

# What an earlier upload to the same repository may have left, and this one does not bring.
STALE = ["*.safetensors", "*.bin", "*.index.json", "losparse_*"]


def push(folder: str | Path, repository: str, *, private: bool = False, message: str = "") -> str:
    """Upload a compressed checkpoint to the Hub in one commit; returns the address of its page.

    The checkpoint is verified first (CheckpointError if it is not sound), and shards of an earlier upload
    that are not part of it are deleted. The token is the one that `hf auth login` stored, or HF_TOKEN.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise UsageError(f"There is no folder {path}. Give the folder that `losparse compress` wrote.")
    require_sound(path)
    name = open_checkpoint(path).name
    with write_errors(path):
        address_card(path, repository)

    from huggingface_hub import HfApi

    api = HfApi()
    with hub_errors(repository):
        created = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=created.repo_id,
            folder_path=path,
            commit_message=message or f"Upload {name}, compressed with losparse",
            delete_patterns=STALE,
            ignore_patterns=[".*", "*.partial"],
        )
    return str(created)
