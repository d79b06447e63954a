"""Why the Hub gave nothing: the true reason, once."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError

import losparse_cli
from losparse_cli.checkpoint.hub import hub_errors
from losparse_cli.errors import SourceError


@pytest.mark.parametrize(
    ("offline", "variable", "local_only", "says"),
    [(True, "HF_HUB_OFFLINE", False, "unset HF_HUB_OFFLINE"),
     (True, "TRANSFORMERS_OFFLINE", False, "unset TRANSFORMERS_OFFLINE"),
     (False, "", False, "cannot be reached to fetch it. Check the path and the network"),
     (False, "", True, "all that local_files_only asks")],
)  # fmt: skip
def test_the_reason_is_the_true_one(
    offline: bool, variable: str, local_only: bool, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "1")
    with pytest.raises(SourceError) as caught, hub_errors("user/model", local_only=local_only):
        raise LocalEntryNotFoundError("not here")
    assert says in str(caught.value)
    assert ("unset" in str(caught.value)) == offline


def test_load_says_it_too() -> None:
    with pytest.raises(SourceError, match="unset HF_HUB_OFFLINE"):
        losparse_cli.load("user/no-such-model")
    with pytest.raises(SourceError, match="unset HF_HUB_OFFLINE"):  # nor is it said to lack a tokenizer
        losparse_cli.generate("user/no-such-model", "abc")


def test_further_tries_are_not_shown(caplog: Any) -> None:
    log = logging.getLogger("huggingface_hub.utils._http")
    before = log.level
    with hub_errors("user/model"):
        log.warning("Retrying in 1s [Retry 1/5].")
    assert caplog.text == ""
    assert log.level == before
