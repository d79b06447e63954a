"""Recipe: what is asked for, resolved for every layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import RecipeError, UsageError, flag, is_number, is_whole
from .recipe_file import BUDGETS, EXCLUSIVE, RANK_CHOICES, SIZE_CHOICES, RecipeFile, asked, read_recipe
from .targets import check_expressions, matches, only
from .units import parse_size

FLOAT_SOLVERS, CODE_SOLVERS = ("magnitude", "oats", "admm"), ("rounding", "feedback")
SOLVERS = (*FLOAT_SOLVERS, *CODE_SOLVERS)
VALUES = ("codes", "float")
ALLOCATIONS = ("uniform", "error")

DEFAULT_BITS, CALIBRATED_BITS = 5.25, 4.25
"""Bits a weight of codes without and with calibration text."""
EMBEDDING_BITS = 7.0
"""Bits a weight of embeddings and output heads, where S is codes."""
MOST_BITS = 8.0
"""The most that may be asked for a weight."""
GRIDS = {"int4": 4, "int8": 8}
"""Whole numbers of a fixed width, as other engines' formats have them -> bits of a number."""
RUN = 32
"""Columns that share a step in a row, of 4 bits, if a layer is made of such runs."""
ROWS_GRID = "int8"
"""Of embeddings and output heads."""
MOST_CODE_BITS = 15
"""Of a code without its sign: finer steps serve no purpose."""
DEFAULT_KEEP, CALIBRATED_KEEP = 0.85, 0.6
"""Share of the bytes kept of floats, without and with calibration text."""
CALIBRATED_RANK_RATIO = 0.2
DEFAULT_ITERATIONS = {"magnitude": 4, "oats": 80, "admm": 120}
"""Solver -> passes over one weight."""
MANY_KEPT, MANY_ITERATIONS = 0.4, 240
"""Share kept from which ADMM is still far from its end after the passes above (docs/performance.md), and how many it
then gets."""


@dataclass(frozen=True)
class Recipe:
    """What to do with every targeted layer; `overrides` holds target -> fields for some of them.

    At most one of rank (columns of U) and rank_ratio (share of the kept parameters in U and V), and at
    most one of size (of the whole result, in bytes or as 90MB), keep (stored bytes over dense bytes), keep_parameters
    ((r(m+n) + nnz) / mn), bits (stored, a weight), value_bits (of each value that sparsity leaves) and grid (int4 or
    int8: whole numbers that other engines' formats hold, and no more bytes than theirs). sparsity: share of S that is
    zero; of floats in place of those, of codes beside bits, value_bits or grid. values: of S, codes (whole numbers) or
    float.
    embedding_bits: where S is codes, of embeddings and output heads, which are in no other budget; "none" leaves them
    dense. sensitivity: on or off, whether codes follow the loss. What is None depends on whether there is calibration
    text: see `settled`. UsageError on contradictions and values out of range.
    """

    rank: int | None = None
    rank_ratio: float | None = None
    sparsity: float | None = None
    size: str | int | None = None
    keep: float | None = None
    keep_parameters: float | None = None
    bits: float | None = None
    value_bits: float | None = None
    grid: str | None = None
    values: str | None = None
    embedding_bits: float | str | None = None
    pattern: str = "unstructured"
    threshold_scope: str | None = None
    iterations: int | None = None
    solver: str | None = None
    sensitivity: str | None = None
    allocate: str = "uniform"
    seed: int = 0
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    overrides: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...] = field(default=())

    def __post_init__(self) -> None:
        for group in EXCLUSIVE:
            _at_most_one(self, group)
        if self.size is not None:
            parse_size(self.size, "--size")
        if self.rank is not None and (not is_whole(self.rank) or self.rank < 0):
            raise UsageError(f"--rank must be a whole number >= 0, not {self.rank!r}; 8 is a usual choice.")
        for name, of in (("bits", "weight"), ("value_bits", "kept value")):
            bits = getattr(self, name)
            if bits is not None and (not is_number(bits) or not 0 < bits <= MOST_BITS):
                raise UsageError(
                    f"{flag(name)} is how many bits a {of} takes, above 0 and at most {MOST_BITS:g}, not {bits!r}; "
                    f"{CALIBRATED_BITS:g} is a usual choice."
                )
        if self.grid not in (None, *GRIDS):
            raise UsageError(f"--grid is {' or '.join(GRIDS)}, not {self.grid!r}.")
        if self.grid is not None and self.sensitivity == "on":
            raise UsageError(
                f"--sensitivity on makes codes of some rows finer than of others, and --grid {self.grid} gives all "
                "rows the same width: leave out one of them."
            )
        given = self.embedding_bits
        if self.grid is not None and given not in (None, "none", GRIDS[ROWS_GRID]):
            raise UsageError(
                f"--embedding-bits {given} is for codes of any width, and --grid {self.grid} keeps embeddings on "
                f"{ROWS_GRID}: leave out one of them, or say --embedding-bits none."
            )
        if given not in (None, "none") and (not is_number(given) or not 0 < given <= MOST_BITS):  # type: ignore[operator]
            raise UsageError(
                f"--embedding-bits is how many bits a weight of an embedding takes, above 0 and at most {MOST_BITS:g}, "
                f"or none, not {given!r}; {EMBEDDING_BITS:g} is a usual choice."
            )
        for name in ("rank_ratio", "sparsity", "keep", "keep_parameters"):
            value = getattr(self, name)
            if value is not None and (not is_number(value) or not 0 <= value <= 1):
                percent = f" Did you mean {value / 100:g}?" if is_number(value) and 1 < value <= 100 else ""
                raise UsageError(f"{flag(name)} is a share between 0 and 1, not {value!r}.{percent}")
        if self.rank_ratio == 1 and self.sparsity not in (None, 1):
            raise UsageError(
                "--rank-ratio 1 leaves no parameters for S, but --sparsity asks for some: lower one of them."
            )
        if self.threshold_scope not in (None, "row", "matrix"):
            raise UsageError(f"--threshold-scope is row or matrix, not {self.threshold_scope!r}.")
        if self.solver not in (None, *SOLVERS):
            raise UsageError(f"--solver is admm, oats, magnitude, feedback or rounding, not {self.solver!r}.")
        if self.values not in (None, *VALUES):
            raise UsageError(f"--values is codes or float, not {self.values!r}.")
        if self.sensitivity not in (None, "on", "off"):
            raise UsageError(f"--sensitivity is on or off, not {self.sensitivity!r}.")
        if self.allocate not in ALLOCATIONS:
            raise UsageError(f"--allocate is uniform or error, not {self.allocate!r}.")
        if self.iterations is not None and (not is_whole(self.iterations) or self.iterations < 1):
            raise UsageError(f"--iterations must be a whole number >= 1, not {self.iterations!r}.")
        if not is_whole(self.seed):
            raise UsageError(f"--seed must be a whole number, not {self.seed!r}.")
        for name in ("targets", "ignore"):
            given = getattr(self, name)
            asked = (given,) if isinstance(given, str) else tuple(given or ())
            if not all(isinstance(target, str) for target in asked):
                raise UsageError(f"{flag(name)} takes names of layers, such as q_proj, not {given!r}.")
            for target in asked:
                check_expressions(target, flag(name))
            object.__setattr__(self, name, asked)
        for target, _ in self.overrides:
            check_expressions(target, "layers:")
        _check_pattern(self)
        _check_values(self)

    @classmethod
    def from_file(cls, path: str | Path) -> Recipe:
        """What a YAML file asks of the layers; `compress` takes the file itself, and all else that it says of a run.

        RecipeError names the file and the entry at fault.
        """
        return recipe_of(read_recipe(path), {})

    def for_layer(self, name: str, kinds: tuple[str, ...] = ()) -> Recipe:
        """This recipe with the overrides that mean the module `name`, of the classes `kinds`; later ones win."""
        recipe = self
        for target, fields in self.overrides:
            if matches(target, name, kinds):
                recipe = override(recipe, dict(fields))
        return recipe

    def for_rows(self, name: str, kinds: tuple[str, ...] = ()) -> Recipe:
        """As `for_layer`, for an embedding or an output head: bits of its own, no U and V, and no pattern."""
        bits = EMBEDDING_BITS if self.embedding_bits in (None, "none") else self.embedding_bits
        own = {"bits": bits} if self.grid is None else {"grid": ROWS_GRID}
        recipe = override(override(self, own).for_layer(name, kinds), {"rank": 0})
        changes: dict[str, Any] = {"sparsity": None, "pattern": Recipe.pattern, "threshold_scope": None}
        if recipe.value_bits is not None:
            changes |= {"value_bits": None, "bits": bits}
        return replace(recipe, **changes)

    def with_overrides(self, layers: Mapping[str, Mapping[str, Any]]) -> Recipe:
        """This recipe with further fields for the layers of these names, which win over what was there."""
        added = tuple((only(name), tuple(sorted(fields.items()))) for name, fields in layers.items())
        return replace(self, overrides=(*self.overrides, *added))

    def settled(self, *, calibrated: bool = False) -> Recipe:
        """This recipe with every choice made that was left open; without calibration text unless told otherwise.

        S is whole numbers, unless something asks for what only floats can do: however many bytes there are, floats of
        as many lose more. Of floats all of the budget is best spent on S without data; with it, a fifth on U and V
        (docs/performance.md).
        """
        coded, why = self._decided()
        for target, fields in self.overrides:
            wrong = _of_other_values(override(Recipe(), dict(fields)), coded)
            if wrong:
                raise UsageError(f"layers: {target}: {_contradiction(wrong.removeprefix('--'), why, coded)}")
        sized = any(getattr(self, name) is not None for name in BUDGETS)
        if coded:
            _check_zeros(self)
            bits = CALIBRATED_BITS if calibrated else DEFAULT_BITS
            own = EMBEDDING_BITS if self.grid is None else GRIDS[ROWS_GRID]
            return replace(
                self,
                values="codes",
                bits=self.bits if sized or self.sparse else bits,
                value_bits=self.value_bits if sized or not self.sparse else bits,
                rank=self.rank or 0,
                solver=self.solver or ("feedback" if calibrated else "rounding"),
                sensitivity=self.sensitivity or ("on" if calibrated and self.grid is None else "off"),
                # Layers that --targets names are all that is meant, unless something is said of embeddings, too.
                embedding_bits=self.embedding_bits or (None if self.targets else own),
                iterations=1,
                threshold_scope=self.threshold_scope or ("row" if self.sparse and calibrated else "matrix"),
            )
        solver = self.solver or ("admm" if calibrated else "magnitude")
        changes: dict[str, Any] = {
            "values": "float",
            "solver": solver,
            # How many passes are worth it is a matter of the share kept, which a size has yet to become.
            "iterations": self.iterations or (None if self.size is not None else self._passes(solver, calibrated)),
            "threshold_scope": self.threshold_scope or ("row" if calibrated else "matrix"),
        }
        fixed = ":" in self.pattern
        if self.sparsity is None and not sized and not fixed:
            changes["keep"] = CALIBRATED_KEEP if calibrated else DEFAULT_KEEP
        if self.rank is None and self.rank_ratio is None and self.sparsity is None and not fixed:
            changes["rank_ratio"] = CALIBRATED_RANK_RATIO if calibrated else 0.0
        return replace(self, **changes)

    @property
    def coded(self) -> bool | None:
        """Whether S is whole numbers; None where nothing that was asked of all layers decides it."""
        return self._asked[0]

    @property
    def _asked(self) -> tuple[bool | None, str]:
        """As `coded`, and the option that decides it."""
        if self.values is not None:
            return self.values == "codes", f"--values {self.values}"
        for coded, asks in ((True, _of_codes(self)), (False, _of_floats(self)), (False, _of_zeros(self))):
            if asks:
                return coded, asks[0]
        return (None, "") if self.rank is None else (False, "--rank")

    def _decided(self) -> tuple[bool, str]:
        """Whether S is whole numbers, and the option or the entry that decides it; see `settled`."""
        coded, why = self._asked
        if coded is not None:
            return coded, why
        alone = [(target, override(Recipe(), dict(fields))) for target, fields in self.overrides]
        asked = [
            (target, coded, of(one)) for target, one in alone for of, coded in ((_of_codes, True), (_of_floats, False))
        ]
        asked += [(target, False, _of_zeros(one)) for target, one in alone]
        for target, coded, asks in asked:
            if asks:
                return coded, f"{asks[0].removeprefix('--')} of layers: {target}"
        return True, ""

    @property
    def sparse(self) -> bool:
        """Whether some entries of S are to be zero, whatever the budget."""
        return self.sparsity is not None or ":" in self.pattern

    def _passes(self, solver: str, calibrated: bool) -> int:
        shares = (self.keep, self.keep_parameters, None if self.sparsity is None else 1 - self.sparsity)
        default = CALIBRATED_KEEP if calibrated else DEFAULT_KEEP
        share = next((share for share in shares if share is not None), default)
        return MANY_ITERATIONS if solver == "admm" and share >= MANY_KEPT else DEFAULT_ITERATIONS[solver]

    def to_dict(self) -> dict[str, Any]:
        """JSON form, complete: defaults included. It is a recipe again, as a mapping."""
        fields = asdict(self)
        del fields["overrides"]
        fields["layers"] = {target: dict(values) for target, values in self.overrides}
        fields["targets"], fields["ignore"] = list(self.targets), list(self.ignore)
        return fields


def recipe_of(file: RecipeFile, given: Mapping[str, Any]) -> Recipe:
    """The recipe in a file under what was given beside it, which wins everywhere, also over settings of single layers.

    RecipeError names the file and the entry at fault.
    """
    with file.errors(given):
        merged = override(override(Recipe(), file.settings), given)
    kept = []
    for target, fields in file.layers.items():
        fields = {k: v for k, v in fields.items() if not _superseded(k, given)}
        if fields:
            with file.errors(given, target):
                override(merged, fields)  # a contradiction is reported here, with its place in the file
            kept.append((target, tuple(sorted(fields.items()))))
    with file.errors(given):
        return replace(merged, overrides=tuple(kept))


def make_recipe(flags: Mapping[str, Any], file: Path | None = None) -> Recipe:
    """The recipe of a YAML file (optional) under command-line flags; flags that are None were not given.

    RecipeError names the file and the entry at fault, which may be what it says of a run.
    """
    given = asked(flags)
    if file is None:
        return Recipe(**given)
    found = read_recipe(file)
    if found.run:
        raise RecipeError(
            f"{file} has the setting {next(iter(found.run))!r}, which is of losparse compress. Remove it."
        )
    return recipe_of(found, given)


def _superseded(name: str, given: Mapping[str, Any]) -> bool:
    group: tuple[str, ...] = next((group for group in (RANK_CHOICES, SIZE_CHOICES) if name in group), (name,))
    return any(other in given for other in group)


def override(recipe: Recipe, fields: Mapping[str, Any]) -> Recipe:
    """`recipe` with `fields` set; a setting replaces those that it excludes (EXCLUSIVE)."""
    changes = dict(fields)
    for group in EXCLUSIVE:
        if any(name in fields for name in group):
            changes |= {name: fields.get(name) for name in group}
    if fields.get("grid") is not None:  # of which these say nothing
        changes = {"sensitivity": None, "embedding_bits": None} | changes
    if ":" in str(fields.get("pattern", "")):
        if "sparsity" not in fields:
            changes["sparsity"] = None  # N:M fixes the density by itself
        budget = any(changes.get(name, getattr(recipe, name)) is not None for name in BUDGETS)
        if budget and "rank_ratio" not in fields:
            changes["rank_ratio"] = None  # and a budget then fixes the rank
    elif "pattern" in fields and changes.get("sparsity", recipe.sparsity) is None and "value_bits" not in fields:
        changes["value_bits"] = None  # which are of what N:M leaves
    return replace(recipe, **changes)


def _check_values(recipe: Recipe) -> None:
    """UsageError for what codes cannot do, or floats."""
    coded, why = recipe._asked
    wrong = "" if coded is None else _of_other_values(recipe, coded)
    if coded is not None and wrong:
        raise UsageError(_contradiction(wrong, why, coded))


def _contradiction(wrong: str, why: str, coded: bool) -> str:
    """A sentence: what was asked that S of such values cannot follow, and what asks for them."""
    here, there = ("floats", "whole numbers") if coded else ("whole numbers", "floats")
    return f"{wrong} is for {here} in S, and {why} for {there}: leave out one of them."


def _of_other_values(recipe: Recipe, coded: bool) -> str:
    """The first thing asked that S of whole numbers (or of floats) cannot follow, as an option; "" if there is none."""
    return next(iter(_of_floats(recipe) if coded else _of_codes(recipe)), "")


def _of_codes(recipe: Recipe) -> list[str]:
    """What was asked that only whole numbers can follow, as options."""
    given = {
        "--bits": recipe.bits,
        "--value-bits": recipe.value_bits,
        "--grid": recipe.grid,
        "--embedding-bits": None if recipe.embedding_bits == "none" else recipe.embedding_bits,
        f"--sensitivity {recipe.sensitivity}": recipe.sensitivity,
        f"--solver {recipe.solver}": recipe.solver if recipe.solver in CODE_SOLVERS else None,
    }
    return [option for option, value in given.items() if value is not None]


def _of_floats(recipe: Recipe) -> list[str]:
    """What was asked that only floats can follow, as options; U and V may stand beside both."""
    given = {
        "--rank-ratio": recipe.rank_ratio,
        "--keep-parameters": recipe.keep_parameters,
        "--iterations": None if recipe.iterations == 1 else recipe.iterations,
        f"--solver {recipe.solver}": recipe.solver if recipe.solver in FLOAT_SOLVERS else None,
        f"--allocate {recipe.allocate}": None if recipe.allocate == "uniform" else recipe.allocate,
    }
    return [option for option, value in given.items() if value is not None]


def _of_zeros(recipe: Recipe) -> list[str]:
    """What was asked of the zeros in S, as options: of floats, unless something asks for whole numbers."""
    given = {
        "--sparsity": recipe.sparsity,
        "--threshold-scope": None if recipe.threshold_scope == "matrix" else recipe.threshold_scope,
        f"--pattern {recipe.pattern}": None if recipe.pattern == "unstructured" else recipe.pattern,
    }
    return [option for option, value in given.items() if value is not None]


def _check_zeros(recipe: Recipe) -> None:
    """UsageError if whole numbers are told something of zeros, and not how many there are."""
    asked = _of_zeros(recipe)
    if recipe.sparse or not (asked or recipe.value_bits is not None):
        return
    what = f"{asked[0]} says where zeros are" if asked else "--value-bits is of the values that zeros leave"
    raise UsageError(f"{what}, and not how many there are: add --sparsity, or leave it out.")


def _check_pattern(recipe: Recipe) -> None:
    keep, colon, group = str(recipe.pattern).partition(":")
    if not colon:
        if recipe.pattern not in ("unstructured", "rows", "columns"):
            raise UsageError(f"--pattern is unstructured, rows, columns or N:M such as 2:4, not {recipe.pattern!r}.")
        return
    if not (keep.isdecimal() and group.isdecimal() and 0 < int(keep) < int(group) <= 16):
        raise UsageError(f"--pattern N:M keeps N non-zeros in every M with N < M <= 16, not {recipe.pattern!r}.")
    sparsity = 1 - int(keep) / int(group)
    if recipe.sparsity is not None and abs(recipe.sparsity - sparsity) > 1e-9:
        raise UsageError(
            f"--pattern {recipe.pattern} has sparsity {sparsity:g} by itself; leave out --sparsity {recipe.sparsity:g}."
        )
    budget = next((flag(name) for name in BUDGETS if getattr(recipe, name) is not None), None)
    if recipe.coded or budget in ("--bits", "--value-bits"):
        return
    if recipe.rank is not None and budget is not None:
        raise UsageError(
            f"--pattern {recipe.pattern} fixes S and --rank fixes U and V: nothing is left for {budget} to decide. "
            "Leave one of them out."
        )
    if recipe.rank_ratio is not None and (budget is not None or recipe.rank_ratio == 1):
        raise UsageError(
            f"--pattern {recipe.pattern} fixes S, so --rank-ratio alone settles the rank, and must be below 1. "
            f"Leave out {budget or '--keep'}, or --rank-ratio."
        )


def _at_most_one(recipe: Recipe, names: tuple[str, ...]) -> None:
    given = [flag(name) for name in names if getattr(recipe, name) is not None]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} contradict each other: give one of them.")
