"""Skeleton and recipe -> the layers that are compressed, with their tensors on disk, and why the others stay dense."""

from __future__ import annotations

from ..budget.plan import Layer
from ..budget.recipe import Recipe
from ..budget.targets import Kinds, choose, matches, parts, require_match
from ..checkpoint.reader import BITS, FLOATING
from ..checkpoint.source import Checkpoint
from ..errors import CheckpointError, UsageError
from ..models.embeddings import Rows, find_rows
from ..models.experts import refuse_surplus_experts
from ..models.names import NameMap
from ..models.skeleton import FUSED, ROUTER, Skeleton, kinds_of


def find_layers(source: Checkpoint, skeleton: Skeleton, recipe: Recipe) -> tuple[list[Layer], dict[str, str]]:
    """Targeted layers with their tensors on disk, and every layer left dense with the reason."""
    kinds = skeleton.kinds
    chosen, skipped = choose(kinds, skeleton.skipped, recipe.targets, recipe.ignore)
    _refuse_routers(kinds, skeleton, recipe)
    rows, reasons = _rows(skeleton, recipe)
    skipped |= reasons
    for target, _ in recipe.overrides:
        require_match(target, kinds, skeleton.linears, "layers:")
    names = NameMap(skeleton.model, source.entries)
    refuse_surplus_experts(skeleton.model, names.disk, source.folder)
    _require_fused(skeleton, names, source)
    layers = []
    for linear in (skeleton.linears[name] for name in chosen):
        parameter = f"{linear.name}.weight"
        tensors = names.disk.get(parameter, [])
        if len(tensors) != 1 or not tensors[0].endswith(".weight"):
            if not tensors and parameter not in names.converted:
                raise _missing(parameter, linear.shape, skeleton, names, source)
            skipped[linear.name] = "assembled from other tensors at load"
            continue
        entry = source.entries[tensors[0]]
        if entry.dtype not in FLOATING:
            raise UsageError(
                f"{entry.name} in {entry.path} is stored as {entry.dtype}, not as floating point: it is quantized "
                "already. Start from the unquantized checkpoint."
            )
        on_disk = tuple(reversed(linear.shape)) if linear.transposed else linear.shape
        if entry.shape != on_disk:
            raise CheckpointError(
                f"{entry.name} in {entry.path} has shape {list(entry.shape)}, but config.json asks for "
                f"{list(on_disk)}. "
                "config.json and the weights do not belong together."
            )
        disk_module = names.disk_module(linear.name, entry.name)
        if disk_module is None:
            skipped[linear.name] = "transformers would rename its factors at load"
            continue
        itemsize = BITS[entry.dtype] // 8
        layers.append(
            Layer(linear.name, entry.name, disk_module, linear.shape, itemsize, linear.transposed, kinds[linear.name])
        )
    for one in rows:
        found = _rows_on_disk(one, source, names, kinds[one.name])
        if isinstance(found, str):
            skipped[one.name] = found
            continue
        layers.append(found)
        for name in (one.name, *one.twins):
            skipped.pop(name, None)
    return layers, skipped


def _missing(
    parameter: str, shape: tuple[int, int], skeleton: Skeleton, names: NameMap, source: Checkpoint
) -> CheckpointError:
    """Why a layer has no tensor: the files are not whole, or config.json names a class that they are not of."""
    found = sum(f"{name}.weight" in names.disk for name in skeleton.linears)
    if 2 * found < len(skeleton.linears):
        return CheckpointError(
            f"{type(skeleton.model).__name__} has {len(skeleton.linears)} linear layers, of which {source.folder} "
            f"holds {found}: there is no {parameter}, and there are names such as {min(source.entries)}. Name the "
            "class that these weights were saved from in 'architectures' of config.json."
        )
    return CheckpointError(
        f"The tensor {parameter} ({shape[0]} x {shape[1]}) is missing from {source.folder}. "
        "Download the checkpoint again, or leave the layer out with --ignore."
    )


def _refuse_routers(kinds: Kinds, skeleton: Skeleton, recipe: Recipe) -> None:
    """UsageError if a part of a target means routers alone: what nobody compresses was asked for."""
    for part in (part for target in recipe.targets for part in parts(target)):
        meant = {name: skeleton.skipped.get(name) for name in kinds if matches(part, name, kinds[name])}
        if set(meant.values()) == {ROUTER}:
            raise UsageError(
                f"--targets {part!r} means routers alone ({next(iter(meant))}), which stay dense: they are small, and "
                "every token depends on them. Name other layers."
            )


def _require_fused(skeleton: Skeleton, names: NameMap, source: Checkpoint) -> None:
    """CheckpointError if a tensor is missing of experts that stay fused: transformers would only warn."""
    parameters = dict(skeleton.model.named_parameters(remove_duplicate=False))
    held = {id(parameters[name]) for name in (*names.disk, *names.converted) if name in parameters}  # or what is tied
    for module in (name for name, reason in skeleton.skipped.items() if reason == FUSED):
        for key, parameter in skeleton.model.get_submodule(module).named_parameters(recurse=False):
            if id(parameter) not in held:
                raise CheckpointError(
                    f"The tensor {module}.{key} is missing from {source.folder}. Download the checkpoint again."
                )


def not_checked(source: Checkpoint, skeleton: Skeleton, recipe: Recipe) -> tuple[frozenset[str], frozenset[str]]:
    """Tensors that may hold anything, as they are of layers that --ignore names; and those that may hold infinities,
    as they are no parameters: masks among the buffers do."""
    model, names = skeleton.model, NameMap(skeleton.model, source.entries)
    parameter = {tensor: name for name, tensors in names.disk.items() for tensor in tensors} | names.converted_from
    parameters = dict(model.named_parameters(remove_duplicate=False))
    ignored, others = set(), set()
    for tensor in source.entries:
        name = parameter.get(tensor, "")
        module = name.rpartition(".")[0]
        if name not in parameters:
            others.add(tensor)
        elif any(matches(target, module, kinds_of(model.get_submodule(module))) for target in recipe.ignore):
            ignored.add(tensor)
    return frozenset(ignored), frozenset(others)


def _rows(skeleton: Skeleton, recipe: Recipe) -> tuple[list[Rows], dict[str, str]]:
    """The embeddings and output heads that are to be coded, and why others are not.

    With --targets they are those that it names, unless bits were asked for.
    """
    if not recipe.coded or recipe.embedding_bits == "none":
        return [], {}
    found, reasons = find_rows(skeleton.model)
    kinds = skeleton.kinds
    if recipe.embedding_bits is None:
        targets = recipe.targets
        others = [n for n in found if not any(matches(target, n, kinds[n]) for target in targets)]
        reasons |= dict.fromkeys(others, "not among --targets")
    ignored = [n for n in found if any(matches(target, n, kinds[n]) for target in recipe.ignore)]
    reasons |= dict.fromkeys(ignored, "named by --ignore")
    return [one for n, one in found.items() if n not in reasons and n not in skeleton.linears], reasons


def _rows_on_disk(rows: Rows, source: Checkpoint, names: NameMap, kinds: tuple[str, ...]) -> Layer | str:
    """The layer that codes these rows, or why they stay dense."""
    stored = names.disk.get(f"{rows.name}.weight", [])
    twins = [tensor for twin in rows.twins for tensor in names.disk.get(f"{twin}.weight", [])]
    if len(stored) != 1 or not stored[0].endswith(".weight"):
        return "stored under another name than its own" if twins else "assembled from other tensors at load"
    if twins:
        return f"stored twice, as {twins[0]}, too"
    entry = source.entries[stored[0]]
    disk_module = names.disk_module(rows.name, entry.name)
    if entry.dtype not in FLOATING or entry.shape != rows.shape:
        return f"stored as {entry.dtype} {list(entry.shape)}"
    if disk_module is None:
        return "transformers would rename its codes at load"
    kind = "head" if rows.head else "embedding"
    return Layer(rows.name, entry.name, disk_module, rows.shape, BITS[entry.dtype] // 8, False, kinds, kind)
