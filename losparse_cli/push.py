"""Verify, address the card, upload once."""

from __future__ import annotations

from pathlib import Path

from .checkpoint.card import address_card
from .checkpoint.hub import hub_errors
from .checkpoint.journal import FILE as JOURNAL
from .checkpoint.source import HUB_ID, identifier_of, open_checkpoint
from .errors import UsageError, write_errors
from .verify import require_sound

# What an earlier upload to the same repository may have left, and this one does not bring.
STALE = [
    "model.safetensors", "model.*.safetensors", "model-*-of-*.safetensors", "model.safetensors.index*.json",
    "pytorch_model*.bin", "pytorch_model.bin.index*.json", "losparse_*.py", "losparse_*.json",
]  # fmt: skip


def push(folder: str | Path, repository: str, *, private: bool = False, message: str = "") -> str:
    """Upload a compressed checkpoint to the Hub in one commit; returns the address of its page.

    The checkpoint is verified first (CheckpointError if it is not sound), and shards of an earlier upload
    that are not part of it are deleted. The token is the one that `hf auth login` stored, or HF_TOKEN.
    UsageError if there is none, or if `private` is asked of a repository that is public.
    """
    path = Path(identifier_of(folder)).expanduser()
    if not path.is_dir():
        raise UsageError(f"There is no folder {path}. Give the folder that `losparse compress` wrote.")
    from huggingface_hub import HfApi

    check_repository(repository)
    require_sound(path)
    name = open_checkpoint(path).name
    with write_errors(path):
        address_card(path, repository)
    api = HfApi()
    with hub_errors(repository):
        created = api.create_repo(repository, private=private, exist_ok=True)
        if private and not api.model_info(created.repo_id).private:
            raise UsageError(
                f"{repository} exists and is public, so --private cannot hold. Make it private on its settings page, "
                "leave out --private, or choose another name."
            )
        api.upload_folder(
            repo_id=created.repo_id,
            folder_path=path,
            commit_message=message or f"Upload {name}, compressed with losparse",
            delete_patterns=STALE,
            ignore_patterns=[".*", "*/.*", "*.partial/*", JOURNAL],
        )
    return str(created)


def check_repository(repository: str) -> None:
    """UsageError if nothing can be uploaded under this name: it is no Hub id, or there is no token."""
    from huggingface_hub import get_token

    if not HUB_ID.fullmatch(repository):
        raise UsageError(f"{repository!r} is no Hub id. Write it as user/name.")
    if get_token() is None:
        raise UsageError(f"Uploading to {repository} needs a Hub token. Log in with: hf auth login")
