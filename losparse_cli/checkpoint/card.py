"""Model card, and the files of the base model that go along."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from .report import Report
from .source import INDEX, PICKLE_INDEX, REPORT, TIMING

CARRIED = (".json", ".jsonl", ".txt", ".model", ".py", ".jinja", ".spm", ".bpe", ".tiktoken", ".vocab", ".merges", ".md")
NOT_CARRIED = ("config.json", "README.md", INDEX, PICKLE_INDEX, REPORT, TIMING)
LICENCES = re.compile(r"(?i)(licen[cs]e|notice|use_policy|copying)")
CARRIED_BYTES = 256 << 20  # a tokenizer is never larger; a stray data set may be


def companion_files(folder: Path) -> list[Path]:
    """Files beside the weights that a compressed copy needs: tokenizer, generation, code, licence; relative.

    Sub-folders are searched one level deep (sentence-transformers keeps its pooling there).
    """
    found = []
    for path in sorted([*folder.glob("*"), *folder.glob("*/*")]):
        relative = path.relative_to(folder)
        if not path.is_file() or any(part.startswith(".") for part in relative.parts):
            continue
        if str(relative) in NOT_CARRIED or path.stat().st_size > CARRIED_BYTES:
            continue
        if path.suffix.lower() in CARRIED or LICENCES.match(path.name):
            found.append(relative)
    return found


def copy_companions(folder: Path, destination: Path) -> None:
    """Copy the companion files byte for byte."""
    for relative in companion_files(folder):
        target = destination / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / relative, target)


def base_metadata(folder: Path) -> dict[str, Any]:
    """The YAML block of the base model's card, {} if it has none or it cannot be read."""
    from huggingface_hub import metadata_load

    try:
        return dict(metadata_load(folder / "README.md") or {})
    except (OSError, ValueError, TypeError):
        return {}
    except Exception as error:
        if type(error).__module__.startswith("yaml"):
            return {}
        raise


def write_card(destination: Path, report: Report, base: dict[str, Any], *, place: str) -> None:
    """README.md of a compressed checkpoint: what it is, how to load it, what it cost.

    base: the base model's metadata. place: the folder or Hub id that the loading snippet names.
    """
    from huggingface_hub import ModelCardData

    name = report.source.get("name", "")
    on_hub = report.source.get("commit") is not None
    carried = {k: base[k] for k in ("license", "license_name", "license_link", "language", "datasets") if base.get(k)}
    pipeline = {"pipeline_tag": base["pipeline_tag"]} if base.get("pipeline_tag") else {}
    metadata = ModelCardData(
        library_name="transformers",
        tags=sorted({"losparse", "low-rank", "sparse", *_texts(base.get("tags"))}),
        **({"base_model": name, "base_model_relation": "quantized"} if on_hub else {}),
        **pipeline,
        **carried,
    )
    text = f"---\n{metadata.to_yaml()}\n---\n\n{_body(report, name, place)}"
    (destination / "README.md").write_text(text, encoding="utf-8")


def address_card(folder: Path, place: str) -> None:
    """Make the loading snippets of a card name `place`; the rest, also what its owner wrote, stays."""
    path = folder / "README.md"
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        named = re.search(r'losparse_cli\.load\("([^"]+)"\)', text)
        if named:
            path.write_text(text.replace(f'("{named[1]}"', f'("{place}"'), encoding="utf-8")


def write_dense_card(destination: Path, metadata: dict[str, Any], source: str) -> None:
    """README.md of a dense export: where it comes from, under the licence it had."""
    from huggingface_hub import ModelCardData

    tags = [tag for tag in _texts(metadata.get("tags")) if tag not in ("low-rank", "sparse")]
    data = ModelCardData(**{**metadata, "tags": tags} if tags else metadata)
    text = (
        f"---\n{data.to_yaml()}\n---\n\n# {destination.name.removesuffix('.partial')}\n\n"
        f"The dense form of {source}, which losparse compressed: every compressed weight is U V + S, rounded once "
        "to the stored dtype. Any tool that reads safetensors loads it; it is as large as the original model.\n"
    )
    (destination / "README.md").write_text(text, encoding="utf-8")


def _texts(value: Any) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def _body(report: Report, name: str, place: str) -> str:
    recipe = {k: v for k, v in report.recipe.items() if v not in (None, [], {}, False)}
    settings = ", ".join(f"{k} {v}" for k, v in sorted(recipe.items()))
    error = report.relative_error
    return f"""# {place.rpartition("/")[2]}

{name} compressed with losparse: each targeted weight is stored as a low-rank part and a sparse part,
W ≈ U V + S (after LoSparse, Li et al., ICML 2023).

## Loading

```python
import losparse_cli
model, tokenizer = losparse_cli.load("{place}")
```

Without the package, with the code that lies in this repository (read it first):

```python
from transformers import AutoModel{_auto_suffix(report)}
model = AutoModel{_auto_suffix(report)}.from_pretrained("{place}", trust_remote_code=True)
```

## Sizes

| | before | after | share |
|---|---|---|---|
| compressed layers, bytes | {report.bytes_before:,} | {report.bytes_after:,} | {_share(report.bytes_after, report.bytes_before)} |
| whole model, bytes | {report.model_bytes_before:,} | {report.model_bytes_after:,} | {_share(report.model_bytes_after, report.model_bytes_before)} |
| parameters of the compressed layers | {report.targeted_parameters:,} | {sum(layer.kept for layer in report.layers):,} | {report.kept_parameters:.1%} |

{len(report.layers)} layers are compressed; they hold {report.targeted_share:.1%} of the model's parameters.
Relative Frobenius error of their weights: {"not recorded" if error is None else f"{error:.4f}"}.
Recipe: {settings}.
"""


def _auto_suffix(report: Report) -> str:
    architecture = str(report.source.get("architecture") or "")
    heads = {
        "ForCausalLM": "ForCausalLM",
        "LMHeadModel": "ForCausalLM",
        "ForSequenceClassification": "ForSequenceClassification",
        "ForQuestionAnswering": "ForQuestionAnswering",
        "ForTokenClassification": "ForTokenClassification",
        "ForMaskedLM": "ForMaskedLM",
        "ForConditionalGeneration": "ForSeq2SeqLM",
    }
    return next((auto for end, auto in heads.items() if architecture.endswith(end)), "")


def _share(after: int, before: int) -> str:
    return f"{after / before:.1%}" if before else "-"
