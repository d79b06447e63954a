"""A model type -> the classes that are tried: the base model, and one head."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

# The first mapping that names a class for a type gives its head.
HEADS = (
    "CausalLM", "Seq2SeqLM", "ImageTextToText", "MultimodalLM", "MaskedLM", "SequenceClassification",
    "SpeechSeq2Seq", "CTC", "ImageClassification", "AudioClassification", "VideoClassification", "ObjectDetection",
    "SemanticSegmentation", "UniversalSegmentation", "DepthEstimation", "QuestionAnswering", "PreTraining",
)  # fmt: skip


def classes(model_type: str) -> Iterator[tuple[type[Any], str]]:
    """(model class, the Auto class that finds it, "" if none does) of a type, the base model first."""
    import transformers
    from transformers.models.auto import modeling_auto

    auto_classes = {
        name: auto
        for name, auto in vars(modeling_auto).items()
        if name.startswith("AutoModel") and inspect.isclass(auto)
    }
    found: dict[type[Any], str] = {}
    for name in sorted(auto_classes, key=lambda name: (name != "AutoModel", _rank(name))):
        # By names: to ask the mapping itself whether it knows a class imports every model there is.
        names = getattr(getattr(auto_classes[name], "_model_mapping", None), "_model_mapping", {})
        if model_type in names:
            made = names[model_type]
            model_class = getattr(transformers, made if isinstance(made, str) else made[0], None)
            if model_class is None:  # transformers lists a class that it does not give out
                continue
            # Some heads are of a part of the type's configuration, and save that part alone; and one configuration
            # may be that of several types, of which the Auto class knows another.
            config = transformers.CONFIG_MAPPING[model_type]
            whole = model_class.config_class is config
            whole = whole and auto_classes[name]._model_mapping._reverse_config_mapping.get(config.__name__) in names
            found.setdefault(model_class, name if whole else "")
        if len(found) == 2:
            break
    if not found:
        found |= dict.fromkeys(_own(transformers.CONFIG_MAPPING[model_type])[:1], "")
    yield from found.items()


def _rank(name: str) -> int:
    head = name.removeprefix("AutoModelFor")
    known = [h.lower() for h in HEADS]
    return known.index(head.lower()) if head.lower() in known else len(known)


def _own(config_class: type[Any]) -> list[type[Any]]:
    """Models of the module beside the configuration's that are built from it, though no Auto class knows them."""
    from importlib import import_module

    import transformers
    from transformers import PreTrainedModel

    module = config_class.__module__.replace(".configuration_", ".modeling_")
    try:
        members = vars(import_module(module)).values()
    except ImportError:
        return []
    return [
        member
        for member in members
        if inspect.isclass(member) and issubclass(member, PreTrainedModel) and member.__module__ == module
        if member.config_class is config_class and hasattr(transformers, member.__name__)
        if not member.__name__.endswith("PreTrainedModel")
    ]
