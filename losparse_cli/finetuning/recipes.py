"""The settings of LoSparse (Li et al., ICML 2023) by name: data, hyper-parameters, and the sizes of its tables.

Those of mnli, squad, xsum and cnn-dailymail are the paper's. For the other tasks of GLUE it names none that were
published with its code: they take mnli's, with phases that are shares of the run, and epochs by the size of the data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import UsageError

_SHARED: dict[str, Any] = {
    "pattern": "rows", "importance": "sensitivity", "threshold": "global", "beta": 0.85, "prune_every": 10, "seed": 7,
    "low_rank_init": "weights",
}  # fmt: skip
_CLASSIFY = {"task": "text-classification", "dataset_name": "nyu-mll/glue", "max_length": 128}
# 0.05 of the parameters in U and V and 0.15 in S: the paper's 20 %.
_FIFTH = {"keep_parameters": 0.2, "rank_ratio": 0.25}
_WRITE = {
    "task": "summarization", "learning_rate": 6e-5, "epochs": 12, "batch_size": 32, "prune_every": 100,
    "initial_warmup_steps": 2 * 6400, "final_warmup_steps": 8 * 6400, "keep_parameters": 0.4, "rank_ratio": 0.875,
}  # fmt: skip


def _glue(name: str, epochs: float, validation: str = "validation") -> dict[str, Any]:
    """A task of GLUE whose phases are shares of the run."""
    return _CLASSIFY | _FIFTH | {
        "dataset_config_name": name, "validation_split": validation, "learning_rate": 9e-5, "epochs": epochs,
        "batch_size": 32,
    }  # fmt: skip


RECIPES: dict[str, dict[str, Any]] = {
    "mnli": _glue("mnli", 8, "validation_matched") | {
        "gradient_accumulation_steps": 8, "warmup_steps": 480, "initial_warmup_steps": 675,
        "final_warmup_steps": 5 * 675,
    },
    "qqp": _glue("qqp", 8),
    "qnli": _glue("qnli", 10),
    "sst2": _glue("sst2", 10),
    "cola": _glue("cola", 20),
    "mrpc": _glue("mrpc", 30),
    "rte": _glue("rte", 30),
    "stsb": _glue("stsb", 30),
    "squad": {
        "task": "question-answering", "dataset_name": "rajpurkar/squad", "max_length": 384, "doc_stride": 128,
        "learning_rate": 5e-5, "epochs": 10, "batch_size": 16, "warmup_steps": 3681, "initial_warmup_steps": 5400,
        "final_warmup_steps": 5 * 5400, "keep_parameters": 0.5, "rank_ratio": 0.1,
    },
    "xsum": _WRITE | {"dataset_name": "EdinburghNLP/xsum", "max_length": 1024, "max_target_length": 64},
    "cnn-dailymail": _WRITE | {
        "dataset_name": "abisee/cnn_dailymail", "dataset_config_name": "3.0.0", "max_length": 1024,
        "max_target_length": 142,
    },
}  # fmt: skip


INSTEAD = {"rank": ("rank_ratio",), "sparsity": ("keep_parameters",)}
"""An option -> those of a recipe that it takes the place of."""


def settings(name: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """Option -> value: those `given`, which win, over the recipe `name`; UsageError if there is none of that name.

    Files that are given take the place of the recipe's dataset.
    """
    if name is None:
        return dict(given)
    if name not in RECIPES:
        raise UsageError(f"There is no recipe {name!r}. The recipes are {', '.join(RECIPES)}.")
    replaced = {other for option, others in INSTEAD.items() if option in given for other in others}
    if "train_file" in given or "validation_file" in given:
        replaced |= {"dataset_name", "dataset_config_name", "validation_split"}
    return {k: v for k, v in (_SHARED | RECIPES[name]).items() if k not in replaced} | dict(given)
