"""What one compression was asked for: by a recipe, and by what was said beside it, which wins; nothing is read."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..budget.recipe import Recipe, override, recipe_of
from ..budget.recipe_file import LEADING, RecipeFile, asked, read_recipe
from ..errors import UsageError, flag, is_number, is_whole
from ..text.documents import SELF
from ..text.request import Calibration
from .parts import Part, part_named


@dataclass(frozen=True)
class Matching:
    """How a block is matched. steps: of Adam, one batch of windows each. lr: at its peak, cosine decay after it."""

    steps: int
    lr: float


OF_FLOATS, OF_CODES = Matching(192, 5e-4), Matching(48, 1e-3)
"""Where nothing else is said: codes are nearer to where they should be, and overfit."""


@dataclass(frozen=True)
class Refinement:
    """How to match a block, None for what suits its layers; UsageError for numbers that train nothing."""

    steps: int | None = None
    lr: float | None = None

    def __post_init__(self) -> None:
        _check_steps(self.steps)
        if self.lr is not None:
            _check_rate(self.lr)

    def settled(self, *, coded: bool) -> Matching:
        """With what was left open; coded: where S is whole numbers."""
        usual = OF_CODES if coded else OF_FLOATS
        return Matching(self.steps or usual.steps, self.lr or usual.lr)


PARTS = ("scales", "norms", "lowrank")
PRECISIONS = ("auto", "float32", "bfloat16")
MINUTES = 20.0
"""How long training goes on where nothing else is said."""
TOGETHER = 256
"""Tokens whose windows pass through a whole model at once, one window at least. The gradient of such a pass is a leaf
of the sum of a step, however many processes share it."""


def passing(length: int) -> int:
    """Windows of so many tokens that pass through a whole model at once."""
    return max(1, TOGETHER // length)


def _check_steps(steps: Any) -> None:
    if steps is not None and (not is_whole(steps) or steps < 1):
        raise UsageError(f"--refine-steps is a whole number >= 1, not {steps!r}.")


def _check_rate(lr: Any) -> None:
    if not is_number(lr) or not 0 < lr < 1:
        raise UsageError(f"--refine-lr is a number between 0 and 1, not {lr!r}; 5e-4 is a usual choice.")


def _parts(given: Any) -> tuple[str, ...]:
    """What --train lists, as text or one by one."""
    found = [part.strip() for part in given.split(",")] if isinstance(given, str) else given
    if not isinstance(found, list | tuple) or not found or not all(part in PARTS for part in found):
        raise UsageError(f"--train lists some of {', '.join(PARTS)}, not {given!r}.")
    return tuple(found)


@dataclass(frozen=True)
class ModelRefinement:
    """What is trained, and how long; UsageError for what trains nothing.

    minutes: from the first step to the last, in which the learning rate falls to zero; None for as long as `steps`
    take. steps: of Adam; None for as many as there is time for, 20 minutes without either. lr: at its peak, as a share
    of what is trained. tokens: of a step. train: of PARTS, what moves: factors of the rows of S (and its values, where
    they are floats), norms and biases, U and V. gradient_checkpointing: blocks run again on the way back, which takes
    less memory and more time, and gives the same; done in any case where memory is short. precision: of PRECISIONS,
    what passes through the model compute in, auto for bfloat16 where that is fast; loss, and what is trained, are
    float32.
    """

    minutes: float | None = None
    steps: int | None = None
    lr: float = 5e-4
    tokens: int = 1024
    train: tuple[str, ...] | str = PARTS
    seed: int = 0
    gradient_checkpointing: bool = False
    precision: str = "auto"

    def __post_init__(self) -> None:
        if self.minutes is not None and (not is_number(self.minutes) or not 0 < self.minutes < float("inf")):
            raise UsageError(f"--refine-minutes is a number above 0, not {self.minutes!r}.")
        _check_steps(self.steps)
        _check_rate(self.lr)
        if not is_whole(self.tokens) or self.tokens < 1:
            raise UsageError(f"--refine-tokens is a whole number >= 1, not {self.tokens!r}.")
        if not is_whole(self.seed) or self.seed < 0:
            raise UsageError(f"seed of a refinement is a whole number >= 0, not {self.seed!r}.")
        if not isinstance(self.gradient_checkpointing, bool):
            given = self.gradient_checkpointing
            raise UsageError(f"gradient_checkpointing of a refinement is true or false, not {given!r}.")
        if self.precision not in PRECISIONS:
            raise UsageError(f"precision of a refinement is {', '.join(PRECISIONS)}, not {self.precision!r}.")
        object.__setattr__(self, "train", _parts(self.train))

    @property
    def seconds(self) -> float | None:
        """The bound in seconds, None without one."""
        if self.minutes is None and self.steps is None:
            return 60 * MINUTES
        return None if self.minutes is None else 60 * self.minutes

    def windows(self, predicted: int) -> int:
        """Of a step, where so many tokens of each are predicted."""
        return max(1, self.tokens // predicted)


@dataclass(frozen=True)
class BothRefinements:
    """Every block matched as it is compressed, and then the whole model trained."""

    blocks: Refinement = field(default_factory=Refinement)
    model: ModelRefinement = field(default_factory=ModelRefinement)


AnyRefinement = Refinement | ModelRefinement | BothRefinements


@dataclass(frozen=True)
class Request:
    """recipe: for the layers, not settled yet. calibration: None without text. refinement: None to train nothing.
    device: auto, cpu, cuda or cuda:N. memory_limit: such as 8GB, None for three quarters of what is free.
    max_shard_size: of a weight file. part: that is to be done, None for all. sensitivity_file: that keeps what the loss
    minds for runs of other sizes. file: that all this comes from, but for what was `given` beside it."""

    recipe: Recipe = field(default_factory=Recipe)
    calibration: Calibration | None = None
    refinement: AnyRefinement | None = None
    device: str = "auto"
    memory_limit: str | None = None
    max_shard_size: str = "5GB"
    part: Part | None = None
    sensitivity_file: str | Path | None = None
    file: RecipeFile = field(default_factory=RecipeFile, compare=False)
    given: frozenset[str] = field(default=frozenset(), compare=False)

    @property
    def blocks(self) -> Refinement | None:
        """How blocks are to be matched, None if they are not."""
        if isinstance(self.refinement, BothRefinements):
            return self.refinement.blocks
        return self.refinement if isinstance(self.refinement, Refinement) else None

    @property
    def towards(self) -> ModelRefinement | None:
        """How the whole model is to be trained when its layers are compressed, None if it is not."""
        if isinstance(self.refinement, BothRefinements):
            return self.refinement.model
        return self.refinement if isinstance(self.refinement, ModelRefinement) else None

    def errors(self) -> AbstractContextManager[None]:
        """In which a UsageError about an entry of the file names it; see `RecipeFile.errors`."""
        return self.file.errors(self.given)

    def settled(self) -> Recipe:
        """The recipe with every choice made that was left open.

        UsageError if something asked for needs text and there is none, leaves nothing to decide, or contradicts what S
        is to hold.
        """
        recipe = self.recipe.settled(calibrated=self.calibration is not None)
        if self.towards is not None and (self.calibration is None or self.calibration.source == SELF):
            raise UsageError(
                "Training a whole model takes text that people wrote: add --calibration with a file or a dataset."
            )
        needs_text = {
            "--refine blocks": self.blocks is not None,
            f"--solver {recipe.solver}": recipe.solver not in ("magnitude", "rounding"),
            "--sensitivity on": recipe.sensitivity == "on",
            "--allocate error": recipe.allocate == "error",
        }
        for option, given in needs_text.items():
            if given and self.calibration is None:
                raise UsageError(
                    f"{option} needs text to calibrate with: add --calibration FILE, or --calibration self."
                )
        if self.part is not None and self.calibration is not None:
            raise UsageError(
                "--part divides what is compressed without text: leave out --calibration, or start the whole run with "
                "torchrun, whose processes share the text."
            )
        if self.sensitivity_file is not None and recipe.sensitivity != "on":
            raise UsageError(
                f"--sensitivity-file {self.sensitivity_file} keeps what --sensitivity on measures, which is for whole "
                "numbers in S and takes --calibration text: add it, or leave out the file."
            )
        sized = recipe.keep is not None or recipe.keep_parameters is not None
        if recipe.allocate == "error" and (not sized or ":" in recipe.pattern or recipe.rank is not None):
            raise UsageError(
                "--allocate error decides rank and size of each layer: give --keep alone, and no N:M pattern."
            )
        return recipe


def make_request(
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    given: Mapping[str, Any] | None = None,
    *,
    calibration: Calibration | Mapping[str, Any] | str | Path | None = None,
    refinement: AnyRefinement | Mapping[str, Any] | str | None = None,
    device: str | None = None,
    memory_limit: str | None = None,
    max_shard_size: str | None = None,
    part: str | Part | None = None,
    sensitivity_file: str | Path | None = None,
) -> Request:
    """The request of a recipe (a Recipe, a mapping, or the path of a YAML file) under what was given beside it.

    given: fields of Recipe; those that are None were not given, and so are the other settings that are None.
    calibration: or only its source. refinement: or `blocks`, `model`, `both` or `off`. A mapping holds their fields,
    and completes what the recipe says. part: such as 2/3. UsageError on contradictions, and for what is none of these.
    """
    wanted = asked(given or {})
    file = RecipeFile()
    if isinstance(recipe, Recipe):
        layers = override(recipe, wanted)
    elif recipe is None:
        layers = Recipe(**wanted)
    elif isinstance(recipe, Mapping | str | Path):
        file = read_recipe(recipe)
        layers = recipe_of(file, wanted)
    else:
        raise UsageError(
            "recipe is a Recipe, a mapping such as {'bits': 3.25}, or the path of a YAML file, not "
            f"{type(recipe).__name__}."
        )
    run = file.run
    beside = {
        "device": device,
        "memory_limit": memory_limit,
        "max_shard_size": max_shard_size,
        "sensitivity_file": sensitivity_file,
    }
    options = frozenset(
        (*wanted, *asked(beside), *_options("calibration", calibration), *_options("refine", refinement))
    )
    with file.errors(options):
        text = _calibration(_merged(run.get("calibration"), calibration, "source", Calibration))
        off = "off" in (refinement, refinement.get("mode") if isinstance(refinement, Mapping) else None)
        asks = None if off else run.get("refine")
        # A mapping that leaves the mode out says how because it wants it; options of the command line hold one.
        how = refinement
        if isinstance(asks, Mapping):
            asks = {"mode": _mode_of(asks), **asks}
        if isinstance(how, Mapping) and "mode" not in how and not asks:
            how = {"mode": _mode_of(how), **how}
        match = _refinement(_merged(asks, how, "mode", Refinement, ModelRefinement, BothRefinements))
    request = Request(
        layers,
        text,
        match,
        _first(device, run.get("device"), Request.device),
        _first(memory_limit, run.get("memory_limit")),
        _first(max_shard_size, run.get("max_shard_size"), Request.max_shard_size),
        part_named(part),
        _first(sensitivity_file, run.get("sensitivity_file")),
        file,
        options,
    )
    with request.errors():
        request.settled()  # what contradicts itself is refused before anything is read
    return request


def _options(name: str, given: Any) -> list[str]:
    """Settings that were given beside a recipe, of what goes by `name`."""
    if not isinstance(given, Mapping):
        return [] if given is None else [name]
    return [name if key in LEADING else f"{name}_{key}" for key in asked(given)]


def _first(*given: Any) -> Any:
    """The first that was given at all; 0 is given, and is refused where it means nothing."""
    return next((value for value in given if value is not None), None)


def _merged(first: Any, second: Any, leading: str, *kinds: type) -> Any:
    """Two ways to say the same as a mapping: what the recipe says, and what was given beside it, which wins."""
    if isinstance(second, kinds):
        return second
    kind = kinds[0]
    found: dict[str, Any] = {}
    for part in (first, second):
        if isinstance(part, str | Path) or (
            isinstance(part, bool) and kind is Refinement
        ):  # YAML reads `off` as a boolean in some versions
            found[leading] = str(part) if not isinstance(part, bool) else "blocks" if part else "off"
        elif isinstance(part, Mapping):
            found |= asked(part)
        elif part is not None:
            name, given = kind.__name__, type(part).__name__
            raise UsageError(f"{name.lower()} is a {name}, a mapping of its fields or a text, not {given}.")
    unknown = found.keys() - {leading} - {one.name for each in kinds for one in fields(each)}
    if unknown:
        raise UsageError(f"{kind.__name__.lower()} has no setting {min(unknown)!r}.")
    return found


def make_calibration(given: Mapping[str, Any]) -> Calibration | None:
    """The text that a mapping of fields asks for, those that are None left out; None for none."""
    return _calibration(asked(given))


def _calibration(found: Any) -> Calibration | None:
    if isinstance(found, Calibration) or not found:
        return found or None
    if "source" not in found:
        option = f"--calibration-{next(iter(found)).replace('_', '-')}"
        raise UsageError(f"{option} says how to use calibration text: add --calibration SOURCE, or leave it out.")
    return Calibration(**found)


def _mode_of(settings: Mapping[str, Any]) -> str:
    """What settings of a refinement alone are of: those that only a whole model has, or blocks."""
    return "blocks" if settings.keys() <= {one.name for one in fields(Refinement)} else "model"


def _refinement(found: Any) -> AnyRefinement | None:
    if isinstance(found, AnyRefinement) or not found:
        return found or None
    mode = found.pop("mode", None)
    kinds: dict[str | None, tuple[Any, ...]] = {
        None: (), "off": (), "blocks": (Refinement,), "model": (ModelRefinement,), "both": (Refinement, ModelRefinement)
    }  # fmt: skip
    if not isinstance(mode, str | None) or mode not in kinds:
        raise UsageError(f"--refine is blocks, model, both or off, not {mode!r}.")
    if not kinds[mode]:
        if found:
            option = f"--refine-{next(iter(found))}"
            raise UsageError(f"{option} says how to refine: add --refine blocks, model or both, or leave it out.")
        return None
    of = {kind: {one.name for one in fields(kind)} for kind in kinds[mode]}
    strange = found.keys() - set().union(*of.values())
    if strange:
        raise UsageError(f"{flag(f'refine_{min(strange)}')} is not of --refine {mode}. Leave it out.")
    if mode == "both":  # steps are those of a block: the whole model has its minutes
        steps = {name: found[name] for name in found.keys() & of[Refinement]}
        whole = {name: found[name] for name in found.keys() & of[ModelRefinement] - {"steps"}}
        return BothRefinements(Refinement(**steps), ModelRefinement(**whole))
    made: Refinement | ModelRefinement = kinds[mode][0](**found)
    return made
