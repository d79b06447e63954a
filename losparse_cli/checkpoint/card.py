"""Model card: what a result is, how to load it, what it cost."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .report import Report, error_of, telling_error, text_used
from .source import read_json

CARRIED_METADATA = ("license", "license_name", "license_link", "language", "datasets", "pipeline_tag")
SNIPPET = re.compile(r'losparse_cli\.load\(("(?:[^"\\]|\\.)*")')
OWN_LOADER = "losparse_quantizer."
FORMS = ("low-rank", "sparse", "quantized")
"""Tags: what the parts of compressed weights are."""
# Of several Auto classes that load an architecture, the one that people know it by.
FIRST = ("ForCausalLM", "ForSeq2SeqLM", "ForMaskedLM", "ForImageTextToText", "")
LAST = ("ForPreTraining", "ForVision2Seq", "WithLMHead")  # collections, and names that transformers gives up


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
    carried = {key: base[key] for key in CARRIED_METADATA if base.get(key)}
    metadata = ModelCardData(
        library_name="transformers",
        tags=sorted({"losparse", *_forms(report), *_texts(base.get("tags"))}),
        **({"base_model": name, "base_model_relation": "quantized"} if on_hub else {}),
        **carried,
    )
    path = destination / "config.json"
    config = read_json(path) if path.is_file() else {"architectures": [report.source.get("architecture")]}
    text = f"---\n{metadata.to_yaml()}\n---\n\n{_body(report, name, place, _loading(config, place))}"
    (destination / "README.md").write_text(text, encoding="utf-8", errors="replace")


def address_card(folder: Path, place: str) -> None:
    """Make the loading snippets of a card name `place`; the rest, also what its owner wrote, stays."""
    path = folder / "README.md"
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        named = SNIPPET.search(text)
        if named:
            path.write_text(text.replace(f"({named[1]}", f"({_quoted(place)}"), encoding="utf-8")


def place_section(folder: Path, title: str, body: str) -> None:
    """Put a section at the end of the card in `folder`, or in place of the one that this put there; the rest stays."""
    path = folder / "README.md"
    if not path.is_file():
        return
    begin, end = f"<!-- losparse: {title} -->", f"<!-- losparse: end of {title} -->"
    section = f"{begin}\n\n## {title}\n\n{body}\n\n{end}"
    text = path.read_text(encoding="utf-8")
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    text = f"{before}{section}{after}" if found and closed else f"{text.rstrip()}\n\n{section}\n"
    path.write_text(text, encoding="utf-8")


FORM_CARDS = {
    "dense": "The dense form of {}, which losparse compressed: every compressed weight is U V + S, rounded once "
    "to the stored dtype. Any tool that reads safetensors loads it; it is as large as the original model.",
    "pack-quantized": "The whole numbers of {}, which losparse compressed, as pack-quantized of compressed-tensors: "
    "vLLM, SGLang and transformers with that library load it. Where there is a folder `adapter`, it holds the low-rank "
    "part, to be loaded on top.",
}
"""Form of an export -> what its card says, of the checkpoint it was made from."""


def write_form_card(destination: Path, metadata: dict[str, Any], source: str, form: str) -> None:
    """README.md of an export: where it comes from, under the licence it had.

    metadata: that of the compressed checkpoint's card. form: of FORM_CARDS.
    """
    from huggingface_hub import ModelCardData

    carried = {key: metadata[key] for key in (*CARRIED_METADATA, "base_model") if metadata.get(key)}
    tags = [tag for tag in _texts(metadata.get("tags")) if tag not in FORMS]
    data = ModelCardData(library_name="transformers", tags=tags or None, **carried)
    text = (
        f"---\n{data.to_yaml()}\n---\n\n# {destination.name.removesuffix('.partial')}\n\n"
        f"{FORM_CARDS[form].format(source)}\n"
    )
    (destination / "README.md").write_text(text, encoding="utf-8", errors="replace")


def _quoted(text: str) -> str:
    """A Python string literal in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def _texts(value: Any) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def _body(report: Report, name: str, place: str, loading: str) -> str:
    recipe = {k: v for k, v in report.recipe.items() if v is not None and v is not False and v not in ([], {})}
    settings = ", ".join(f"{k} {v}" for k, v in sorted(recipe.items()))
    layers, model = (
        _share(report.bytes_after, report.bytes_before),
        _share(report.model_bytes_after, report.model_bytes_before),
    )
    return f"""# {place.rpartition("/")[2]}

{name} compressed with losparse: each targeted weight is stored as {_parts(report)}.

## Loading

{loading}

## Sizes

| | before | after | share |
|---|---|---|---|
| compressed layers, bytes | {report.bytes_before:,} | {report.bytes_after:,} | {layers} |
| whole model, bytes | {report.model_bytes_before:,} | {report.model_bytes_after:,} | {model} |
{_density(report)}

{len(report.layers)} layers are compressed; they hold {report.targeted_share:.1%} of the model's parameters.
{_error(report)}{_refinement(report)}Recipe: {settings}.
{_calibration(report)}{_training(report)}"""


def _forms(report: Report) -> list[str]:
    """Those of FORMS that the parts of the compressed weights have."""
    low_rank = any(layer.spec.rank for layer in report.layers)
    sparse = any(0 < layer.density < 1 and not layer.coded for layer in report.layers)
    coded = any(layer.coded for layer in report.layers)
    return [form for form, there in zip(FORMS, (low_rank, sparse, coded), strict=True) if there]


def _parts(report: Report) -> str:
    """What stands in place of each targeted weight, in words."""
    forms = _forms(report)
    S = "a sparse matrix S"
    if "quantized" in forms:
        S = "whole numbers with a factor for each row and each column, coded by how often each occurs"
    if "low-rank" not in forms:
        return S
    if not any(layer.spec.nnz for layer in report.layers):
        return "a product of two low-rank factors, W ≈ U V"
    return (
        f"a low-rank part U V and {'a part S of ' if 'quantized' in forms else ''}{S}, W ≈ U V + S (after LoSparse, "
        "Li et al., ICML 2023)"
    )


def _density(report: Report) -> str:
    """A row of the table of sizes: bits where S is whole numbers, of which zeros cost little; else what is kept."""
    if report.coded:
        before = 8 * report.bytes_before / max(1, report.targeted_parameters)
        share = _share(report.bits, before)
        return f"| bits a weight of the layers, embeddings and heads aside | {before:g} | {report.bits:.3f} | {share} |"
    kept = sum(layer.kept for layer in report.layers)
    share = f"{report.kept_parameters:.1%}"
    return f"| parameters of the compressed layers | {report.targeted_parameters:,} | {kept:,} | {share} |"


def _error(report: Report) -> str:
    """A line with the one that says most; "" if none was measured. With calibration text, that of weights would say
    nothing of quality."""
    measure = telling_error(report.layers)
    error = error_of(report.layers, measure)
    what = {
        "held_out_error": "Mean relative error of their outputs on held-out calibration text",
        "output_error": "Mean relative error of their outputs on the very text they were solved with",
        "relative_error": "Relative Frobenius error of their weights",
    }[measure]
    return "" if error is None else f"{what}: {error:.4f}.\n"


def _refinement(report: Report) -> str:
    """Sentences on what was trained to come nearer to the dense model, in the order in which it was; "" if nothing."""
    told = []
    if (matched := report.matching) is not None and matched.before:
        told.append(
            f"Each block was trained to match the dense one: {matched.where} {matched.change:+.0%} of their distance.\n"
        )
    if (found := report.divergence) is not None:
        told.append(
            f"Trained towards the whole dense model for {report.refinement['steps']:,} steps, its codes as they were: "
            f"{found.where} {found.before:.4f} nats a token from its predictions before, {found.after:.4f} after.\n"
        )
    return "".join(told[::-1] if report.refinement.get("followed_by") else told)


def _calibration(report: Report) -> str:
    """The text, as a section of the card; nothing without any."""
    if not report.calibration:
        return ""
    warnings = "".join(f"\n- {sentence}" for sentence in _texts(report.calibration.get("warnings")))
    warned = f"\nOf that text the run warned:\n{warnings}\n" if warnings else ""
    return f"\n## Calibration\n\nCalibrated on {text_used(report.calibration)}.\n{warned}"


def _training(report: Report) -> str:
    """What training did, as a section of the card; nothing without any."""
    if not report.training:
        return ""
    scores = report.training.get("scores") or {}
    rows = "".join(f"| {name} | {value:.4g} |\n" for name, value in scores.items())
    table = f"\n| score, on the validation data | |\n|---|---|\n{rows}" if rows else ""
    what = f"Trained with losparse for {report.training.get('steps', 0):,} steps ({report.training.get('objective')})."
    return f"\n## Training\n\n{what}\n{table}"


def _loading(config: dict[str, Any], place: str) -> str:
    """The snippets that load what lies beside `config`, and whether the package is needed for it."""
    code = {key: value for key, value in (config.get("auto_map") or {}).items() if OWN_LOADER not in str(value)}
    trust = ", trust_remote_code=True" if code else ""
    snippet = f"""```python
import losparse_cli
model, tokenizer = losparse_cli.load({_quoted(place)}{trust})
```"""
    auto = auto_class(config)
    plain = "Plain `from_pretrained` stops, with sizes that do not match."
    if "AutoConfig" in code or auto is None:
        why = "has a configuration of its own" if code else "is of a class that no Auto class of transformers loads"
        return f"{snippet}\n\nThe model {why}, so it loads only where the package is installed. {plain}"
    return f"""{snippet}

Without the package, with the code that lies in this repository (read it first):

```python
from transformers import {auto}
model = {auto}.from_pretrained({_quoted(place)}, trust_remote_code=True)
```

{plain}"""


def auto_class(config: Mapping[str, Any]) -> str | None:
    """The Auto class that makes of this configuration the class that it names; None if there is none."""
    from transformers.models.auto import modeling_auto

    architecture, kind = str((config.get("architectures") or [""])[0]), config.get("model_type")
    for name, place in (config.get("auto_map") or {}).items():
        if name.startswith("AutoModel") and str(place).endswith(f".{architecture}"):
            return str(name)
    found = []
    for name, value in vars(modeling_auto).items():
        known = getattr(getattr(value, "_model_mapping", None), "_model_mapping", None)
        if name.startswith("AutoModel") and known is not None:
            classes = known.values() if kind is None else [known.get(kind)]
            if any(architecture == c or (isinstance(c, tuple | list) and architecture in c) for c in classes):
                found.append(name.removeprefix("AutoModel"))
    ranked = sorted(found, key=lambda suffix: FIRST.index(suffix) if suffix in FIRST else 50 + (suffix in LAST))
    return f"AutoModel{ranked[0]}" if ranked else None


def _share(after: float, before: float) -> str:
    return f"{after / before:.1%}" if before else "-"
