"""Each class in processes of its own, forked from two that have imported all they need; one knows losparse."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .check import Stop, sentence, with_losparse, without_losparse
from .models import classes

SECONDS = 150  # of one step of one class; on an idle machine it takes two
MEMORY = 12 << 30


def in_child(work: Callable[[], Any]) -> Any:
    """What `work` returns, made in a process of its own. A dict with `fault` or `stopped` if it returns nothing."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        signal.alarm(SECONDS)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        with os.fdopen(writer, "w") as out:
            json.dump(_guarded(work), out)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as heard:
        said = heard.read()
    _, status = os.waitpid(child, 0)
    if said:
        return json.loads(said)
    return {"fault": "takes too long" if status == signal.SIGALRM else f"the process died of signal {status}"}


def _guarded(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except Stop as stop:
        return {"stopped": str(stop)}
    except ImportError as error:
        return {"stopped": f"no tiny configuration: {sentence(error)}"}
    except BaseException as error:
        last = [f for f in traceback.extract_tb(error.__traceback__) if "losparse_cli" in f.filename]
        where = f" (losparse_cli{last[-1].filename.rpartition('losparse_cli')[2]}:{last[-1].lineno})" if last else ""
        if os.environ.get("ZOO_TRACEBACK"):
            traceback.print_exc()
        return {"fault": sentence(error) + where}


class Server:
    """A process that has imported losparse, and forks one for each class that it is asked for."""

    def __init__(self) -> None:
        asked, self._ask = os.pipe()
        self._answer, answered = os.pipe()
        if os.fork() == 0:
            os.close(self._ask)
            os.close(self._answer)
            _warm()
            with os.fdopen(asked) as requests, os.fdopen(answered, "w") as answers:
                for line in requests:
                    model_type, name, auto, folder = json.loads(line)
                    found = in_child(lambda: with_losparse(model_type, named(model_type, name), auto, Path(folder)))  # noqa: B023
                    answers.write(json.dumps(found) + "\n")
                    answers.flush()
            os._exit(0)
        os.close(asked)
        os.close(answered)
        self._requests, self._answers = os.fdopen(self._ask, "w"), os.fdopen(self._answer)

    def check(self, model_type: str, name: str, auto: str, folder: Path) -> dict[str, Any]:
        """`with_losparse` of the class called `name`."""
        self._requests.write(json.dumps([model_type, name, auto, str(folder)]) + "\n")
        self._requests.flush()
        found: dict[str, Any] = json.loads(self._answers.readline())
        return found


def _warm() -> None:
    """Import what every class needs, read the sources that all of them share, and measure this machine once."""
    from functools import cache

    from tokenizers import trainers  # noqa: F401
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, conversion_mapping
    from transformers.models.auto import tokenization_auto  # noqa: F401

    import losparse_cli
    from losparse_cli.compression import estimate
    from losparse_cli.linalg.precision import fast_float32
    from losparse_cli.models.ownership import read_by_others

    for verb in ("compress", "export", "load", "verify", "Calibration", "Recipe"):
        getattr(losparse_cli, verb)
    conversion_mapping.get_checkpoint_conversion_mapping("llama")
    with torch.device("meta"):
        for model in (LlamaForCausalLM(LlamaConfig(num_hidden_layers=1)), BertModel(BertConfig(num_hidden_layers=1))):
            read_by_others(model)
        read_by_others(torch.nn.Conv2d(1, 1, 1))
    estimate._speeds = cache(estimate._speeds)
    estimate._speeds(torch.device("cpu"))
    with fast_float32():
        pass


def sweep(types: list[str], results: Path, done: set[tuple[str, str]]) -> None:
    """Append a line to `results` for each class of each of `types` that is not done: heads, then base models."""
    server = Server()
    for bases in (False, True):
        for model_type in types:
            begun = time.monotonic()
            if (model_type, "") in done:
                continue
            chosen = in_child(lambda: [(c.__name__, auto) for c, auto in classes(model_type)])  # noqa: B023
            if isinstance(chosen, list) and chosen:
                chosen = chosen[:-1] if bases else chosen[-1:]
            if bases and (not chosen or isinstance(chosen, dict)):
                continue
            for line in _of(server, model_type, chosen, done):
                with results.open("a", encoding="utf-8") as out:
                    out.write(json.dumps({"type": model_type, **line}) + "\n")
                print(f"{model_type} ({time.monotonic() - begun:.1f} s), {line['class']}: {short(line)}", flush=True)


def _of(server: Server, model_type: str, chosen: Any, known: set[tuple[str, str]]) -> list[dict[str, Any]]:
    if not isinstance(chosen, list):
        return [{"class": "", "auto": "", **chosen}]
    if not chosen:
        return [{"class": "", "auto": "", "stopped": "no model of its own"}]
    return [
        {"class": name, "auto": auto, **_class(server, model_type, name, auto)}
        for name, auto in chosen
        if (model_type, name) not in known
    ]


def _class(server: Server, model_type: str, name: str, auto: str) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(prefix="losparse-zoo-"))
    begun = time.monotonic()
    try:
        found = server.check(model_type, name, auto, folder)
        if auto and (folder / "plain").is_dir():
            unregistered = in_child(lambda: _unregistered(model_type, name, auto, folder))
            fault = unregistered if isinstance(unregistered, str) else unregistered.get("fault", "")
            if fault:
                found.setdefault("faults", []).append(
                    fault if fault.startswith("shipped") else f"shipped loader: {fault}"
                )
        unnamed = json.loads(json.dumps(found).replace(str(folder), "the model"))  # which lies elsewhere each time
        return {**unnamed, "seconds": round(time.monotonic() - begun, 1)}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _unregistered(model_type: str, name: str, auto: str, folder: Path) -> str:
    import sys

    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    assert "losparse" not in AUTO_QUANTIZER_MAPPING
    assert not any(module.startswith("losparse_cli") for module in sys.modules)
    return without_losparse(named(model_type, name), auto, folder)


def named(model_type: str, name: str) -> type[Any]:
    """The class called `name` among those tried for a type."""
    return next(c for c, _ in classes(model_type) if c.__name__ == name)


def short(line: dict[str, Any]) -> str:
    problem = line.get("stopped") or line.get("fault") or "; ".join(line.get("faults", ())) or line.get("note")
    return problem or f"{line.get('layers')} layers, calibrated: {line.get('calibrated', 'reads no text')}"
