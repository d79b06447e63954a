"""One block of the model on its way from dense to compressed: its layers solved, then matched to the dense block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..budget.plan import LayerPlan
from ..calibration.moments import Fed, gather_fed
from ..checkpoint.config import layer_specs, layer_tensors
from ..checkpoint.layers import read_layer, unpack_layer
from ..checkpoint.reader import FLOATING, TORCH_DTYPES
from ..checkpoint.report import LayerReport
from ..checkpoint.source import Checkpoint
from ..errors import CheckpointError
from ..linalg.error import output_error, relative_error, squared_norm
from ..linalg.factors import Decomposition, LowRankCodes, LowRankSparse
from ..linalg.svd import seed_of
from ..models.blocks import Call
from ..parallel.group import Ranks, said_once
from ..parallel.shares import deal
from ..shim.layouts import LayerSpec
from .assembly import Assembly
from .coded import Coder, coded_within, latents_of, own_steps
from .exchange import Stored, decomposition, everywhere
from .matching import LOSSES, match_block
from .moving_codes import Rounding, made_with
from .plan import Job
from .rounds import copies_held, rounds
from .rows import code_rows
from .schedule import Schedule
from .solve import as_matrix, effort, encode, solve_layer, solve_layers
from .steps import Steps

LATENT = "latent"
"""Beside the suffixes of a layer's tensors, where ranks hand each other what its codes were rounded from."""


@dataclass(frozen=True)
class Batches:
    """Calls of a block that are this rank's. first: number of the first of them among those of all ranks."""

    calls: Sequence[Call] = ()
    first: int = 0


class Block:
    """The block `name` of a job, written by a schedule; `module` holds the dense weights in float32.

    Layers go by their names inside it.

    numbers: its units; others than all that lie in it may be given, as of the whole model those outside its blocks.
    plans: layer -> its plan. solved: layer -> what was found, once it was. norms: tensor on disk -> one-dimensional
    parameter of the model that is trained along with the layers.
    """

    def __init__(
        self,
        name: str,
        job: Job,
        made: Schedule,
        assembly: Assembly,
        say: Callable[[str], None],
        steps: Steps,
        group: Ranks,
        numbers: range | None = None,
    ) -> None:
        self.steps, self.group = steps, group
        self.name, self.job, self.assembly = name, job, assembly
        self.numbers = job.blocks[name] if numbers is None else numbers
        self._units = {number: made.units[number] for number in self.numbers}
        self.module: nn.Module = assembly.model.get_submodule(name)
        self.prefix = f"{name}." if name else ""
        self._tell = say
        self.plans: dict[str, LayerPlan] = {}
        self.norms: dict[str, str] = {}
        for entry, plan in self._units.values():
            parameter = assembly.parameter(entry.name)
            if plan is not None:
                self.plans[plan.layer.name.removeprefix(self.prefix)] = plan
            elif parameter is not None and len(entry.shape) == 1 and entry.dtype in FLOATING:
                self.norms[entry.name] = parameter
        self.solved: dict[str, Decomposition] = {}
        self._owner: dict[str, int] = {}  # layer -> the rank that solves and measures it, if not the first
        self._held_out: dict[str, Tensor] = {}  # layer -> second moment of what it is fed in windows that are held out
        self._tokens: dict[str, int] = {}  # layer -> how many it is solved with
        self._asked: dict[str, float | None] = {}  # log2 of the step of each layer, as the block was begun
        self._ceilings: dict[str, float] = {}  # bytes that layers may take before the last of their pool
        self._encoded: dict[str, tuple[LayerReport, dict[str, Tensor]]] = {}
        self._latents: dict[str, Tensor] = {}  # layer -> what its codes were rounded from, where they are to move

    def _say(self, text: str) -> None:
        self._tell(f"{self.name or 'the model'}: {text}")

    def parameters(self) -> list[str]:
        """Names of the block's parameters in the model."""
        return [f"{self.prefix}{name}" for name, _ in self.module.named_parameters()]

    # --- the layers -----------------------------------------------------------------------------

    def solve(self, calls: Batches, unseen: Batches, on_layer: Callable[[LayerReport], None]) -> None:
        """Solve every layer for what it is fed in `calls`; without data those that the text never reaches.

        Errors are measured on what the dense block's layers are fed in calls that are held out, `unseen`, too. Each
        group of layers that share their inputs is solved by one rank, and then known to all.
        """
        self._asked = self.steps.log_steps(plan.layer.name for plan in self.plans.values())
        self._share_out([(layer,) for layer, plan in self.plans.items() if plan.layer.rows], {}, on_layer)
        copies = copies_held(len(calls.calls), len(unseen.calls))
        copies = max(self.group.agree(copies))
        made = rounds({layer: self.plans[layer] for layer in self._fed}, self.job.memory // 2, copies)
        for number, layers in enumerate(made):
            part = f", part {number + 1} of {len(made)}" if len(made) > 1 else ""
            self._say(f"gathering what its layers are fed{part}")
            found = gather_fed(
                self.module, layers, calls.calls, prefix=self.prefix, group=self.group, first=calls.first,
                owners=self._owners,
            )  # fmt: skip
            self._owner |= {layer: fed.owner for fed in found for layer in fed.layers}
            self._hold_out(layers, unseen, lambda found: [self._owner_of(fed.layers[0]) for fed in found])
            self._tokens |= {layer: fed.tokens for fed in found for layer in fed.layers}
            self._share_out([fed.layers for fed in found], {fed.layers: fed for fed in found}, on_layer)
        self._share_out([(layer,) for layer in self.plans if layer not in self.solved], {}, on_layer)
        self._install()

    def _owners(self, found: Sequence[Fed]) -> list[int]:
        """Which rank solves which group, by what that costs."""
        costs = [sum(effort(self.plans[layer], self.job.recipe) for layer in fed.layers) for fed in found]
        return deal(costs, self.group.size)

    def _owner_of(self, layer: str) -> int:
        return self._owner.get(layer, 0)

    def _hold_out(
        self, layers: Sequence[str], unseen: Batches, owners: Callable[[Sequence[Fed]], Sequence[int]]
    ) -> None:
        """What `_unseen_error` measures with, at the rank that owns a layer; for these layers and no others: so many
        fit into memory. owners: of those layers that have none yet, too."""
        found = gather_fed(
            self.module, layers, unseen.calls, prefix=self.prefix, share=False, group=self.group, first=unseen.first,
            owners=owners,
        )  # fmt: skip
        self._held_out = {}
        for fed in found:
            for layer in fed.layers:
                self._owner.setdefault(layer, fed.owner)
            H = fed.moments().H if fed.owner == self.group.rank else None
            if len({self._owner_of(layer) for layer in fed.layers}) > 1:  # some of them the other windows never reached
                H = self.group.broadcast(fed.owner, {} if H is None else {"H": H})["H"]
            if H is not None:
                self._held_out |= dict.fromkeys(fed.layers, H)

    def _share_out(
        self,
        groups: Sequence[tuple[str, ...]],
        fed: Mapping[tuple[str, ...], Fed],
        on_layer: Callable[[LayerReport], None],
    ) -> None:
        """Solve these groups of layers, each at the rank that holds what it was fed; without data at the first one.

        First those whose step is known, then those that have to make the bytes of their pool come out.
        """
        early: list[tuple[str, ...]] = []
        late: list[tuple[str, ...]] = []
        block = {plan.layer.name for plan in self.plans.values()}
        before: set[str] = set()
        for layers in groups:
            names = {self.plans[layer].layer.name for layer in layers}
            (late if self.steps.are_last(names, before, block) else early).append(layers)
            before |= names

        def solve(layers: tuple[str, ...]) -> None:
            self._solve(layers, fed[layers].moments().H if layers in fed else None, layers in late)

        # Known before any of them has taken its bytes, or several processes would allow others than one.
        self._ceilings = self._ceilings_of(early)
        self._by_owners(early, solve, on_layer)
        # The last ones heed what those before took, and the last of all pays for it, so that it is the largest.
        for one in sorted(late, key=lambda layers: sum(self.plans[layer].expected_bytes for layer in layers)):
            self._ceilings = self._ceilings_of([one])
            self._by_owners([one], solve, on_layer)

    def _by_owners(
        self,
        groups: Sequence[tuple[str, ...]],
        find: Callable[[tuple[str, ...]], None],
        on_layer: Callable[[LayerReport], None],
    ) -> None:
        """Find out about each group of layers at the rank that owns them, and make that known to all."""
        # One process writes what it has as soon as it has it.
        for together in [[one] for one in groups] if self.group.size == 1 else [groups]:
            for layers in together:
                if self.group.rank == self._owner_of(layers[0]):
                    find(layers)
            for layers in together:
                self._make_known(layers, on_layer)

    def _ceilings_of(self, groups: Iterable[Sequence[str]]) -> dict[str, float]:
        return self.steps.ceilings(self.plans[layer].layer.name for layers in groups for layer in layers)

    def _solve(self, layers: Sequence[str], H: Tensor | None, late: bool) -> None:
        """Layers that are fed the same inputs, of second moment H; without data where there is none."""
        plans = [self.plans[layer] for layer in layers]
        if plans[0].layer.rows:
            coded = code_rows(plans[0], self._stored(layers[0]), self.job.device)
            self.solved[layers[0]] = coded.solved
            self._encoded[layers[0]] = coded.report, coded.tensors
            return
        self._say(f"solving {', '.join(layer.rpartition('.')[2] for layer in layers)}")
        if self.job.recipe.coded:
            self._code(layers, H, late)
            return
        stored = [self._stored(layer) for layer in layers]
        recipe, device = self.job.recipe, self.job.device
        if H is None:
            found = [solve_layer(plan, W, recipe, device) for plan, W in zip(plans, stored, strict=True)]
        else:
            found = solve_layers(plans, stored, H, recipe, device)
        for layer, one in zip(layers, found, strict=True):
            unseen = None if H is None else self._unseen_error(layer, one.factors)
            self.solved[layer] = replace(one, held_out_error=unseen)

    def _make_known(self, layers: Sequence[str], on_layer: Callable[[LayerReport], None]) -> None:
        """What the owner found of these layers, on every rank."""
        if self.group.size > 1:
            owner = self._owner_of(layers[0])
            mine = self.group.rank == owner
            found = everywhere(self.group, owner, [self._with_latent(layer) for layer in layers] if mine else [])
            for layer, (report, parts) in () if mine else zip(layers, found, strict=True):
                if LATENT in parts:
                    self._latents[layer] = parts.pop(LATENT)
                self._encoded[layer] = report, parts
                self.solved[layer] = decomposition(report, parts, self.job.device)
        for layer in layers:
            report = self.encode(layer)[0]
            self.steps.spend(report)
            on_layer(report)

    def _with_latent(self, layer: str) -> Stored:
        report, parts = self.encode(layer)
        return report, parts | ({LATENT: self._latents[layer]} if layer in self._latents else {})

    @property
    def _fed(self) -> list[str]:
        """The layers that are solved for what they are fed: an embedding is fed tokens, and no head is calibrated."""
        return [layer for layer, plan in self.plans.items() if not plan.layer.rows]

    def _code(self, layers: Sequence[str], H: Tensor | None, late: bool) -> None:
        """Whole numbers for layers that are fed the same inputs, at the step that the rest of the model has, too."""
        plans = [self.plans[layer] for layer in layers]
        names = [plan.layer.name for plan in plans]
        stored = [self._stored(layer) for layer in layers]
        recipe, steps = self.job.recipe, self.steps
        coder = Coder(
            plans, stored, H if recipe.solver == "feedback" else None, [steps.g(name) for name in names], recipe.seed,
            self.job.device,
        )  # fmt: skip
        known = steps.log_steps(names) if late else self._asked
        asked = [known[name] for name in names]
        if None in asked:
            asked = [own if step is None else step for own, step in zip(own_steps(coder), asked, strict=True)]
        coded = coded_within(coder, steps.pots(plans, self._ceilings), [step for step in asked if step is not None])
        for layer, one in zip(layers, coded, strict=True):
            unseen = None if H is None else self._unseen_error(layer, one.solved.factors)
            self.solved[layer] = replace(one.solved, held_out_error=unseen)
            report = replace(one.report, held_out_error=unseen, tokens=self._tokens.get(layer))
            self._encoded[layer] = report, one.tensors
        if self.job.refinement is not None:
            found = coder.latents([one.solved.factors for one in coded])
            self._latents |= dict(zip(layers, found, strict=True))

    def start_from(
        self, start: Checkpoint, calls: Batches, unseen: Batches, on_layer: Callable[[LayerReport], None]
    ) -> None:
        """Take the layers, and the norms, that the compressed checkpoint `start` holds; `unseen` as for `solve`.

        calls: on which layers of whole numbers were solved, or others like them.
        """
        self._hold_out(self._fed, unseen, self._owners)
        known = {line["name"]: line for line in start.report().get("layers", ())}
        files = {file.path: file for file in start.files}
        specs = layer_specs(start)

        def read(layers: tuple[str, ...]) -> None:
            (layer,) = layers
            name = self.plans[layer].layer.name
            factors = read_layer(start, name, specs[name], layer_tensors(start, name, specs[name])).to(self.job.device)
            line = known.get(name, {})
            if line.get("tokens") is not None:
                self._tokens[layer] = line["tokens"]
            self.solved[layer] = self._measured(layer, factors, line.get("errors", ()), line.get("output_errors", ()))

        self._by_owners([(layer,) for layer in self.plans], read, on_layer)
        self._find_latents(calls)
        self._install()
        for tensor, parameter in self.norms.items():
            entry = start.entries.get(tensor)
            if entry is None:
                error = CheckpointError(f"{start.address} has no tensor {tensor}. Compress the model again.")
                raise said_once(self.group, error)
            self._set_norm(parameter, files[entry.path].read(entry))

    def _find_latents(self, calls: Batches) -> None:
        """What the codes of layers that are there already would have been rounded from, for what they are fed."""
        coded: dict[str, LowRankCodes] = {}
        for layer in self._fed:
            if isinstance(factors := self.solved[layer].factors, LowRankCodes):
                coded[layer] = factors
        copies = max(self.group.agree(copies_held(len(calls.calls), 0)))
        for layers in rounds({layer: self.plans[layer] for layer in coded}, self.job.memory // 2, copies):
            found = gather_fed(
                self.module, layers, calls.calls, prefix=self.prefix, group=self.group, first=calls.first,
                owners=self._owners,
            )  # fmt: skip
            mine = [fed for fed in found if fed.owner == self.group.rank]
            for fed in mine:
                H = fed.moments().H
                for layer in fed.layers:
                    W = as_matrix(self._stored(layer), self.plans[layer].layer, self.job.device)
                    self._latents[layer] = latents_of(W, coded[layer], H)
            for fed in found:
                own = {layer: self._latents[layer] for layer in fed.layers} if fed in mine else {}
                self._latents |= self.group.broadcast(fed.owner, own)
        for layer in coded.keys() - self._latents.keys():  # text never reaches it
            self._latents[layer] = coded[layer].codes.float()

    def restore(self, tensors: dict[int, dict[str, Tensor]], specs: dict[int, LayerSpec]) -> None:
        """Take the weights that an earlier run has written: unit -> tensors by name, unit -> spec of a layer."""
        for number, (entry, plan) in self._units.items():
            if plan is not None:
                parts = {name.rpartition(".")[2]: t.to(self.job.device) for name, t in tensors[number].items()}
                factors = unpack_layer(specs[number], parts)
                self._set_weight(plan.layer.name.removeprefix(self.prefix), factors)
            elif entry.name in self.norms and entry.name in tensors[number]:
                self._set_norm(self.norms[entry.name], tensors[number][entry.name])

    def match(
        self, calls: Sequence[Call], targets: Sequence[Tensor], places: Sequence[tuple[int, int]]
    ) -> dict[str, Any]:
        """Train layers and norms towards `targets`; a line of the report with the loss before and after, {} where no
        rank has anything to train on.

        places: step and place in it of those calls that are trained on; the others, at the end, are only measured on.
        """
        if not any(self.group.agree(len(places))):
            return {}
        refinement = self.job.refinement
        assert refinement is not None
        dtypes = {tensor: TORCH_DTYPES[self.job.source.entries[tensor].dtype] for tensor in self.norms}
        matched = match_block(
            self.module,
            calls,
            targets,
            {layer: self.solved[layer].factors for layer in self._fed},  # in the same order on all ranks
            {parameter.removeprefix(self.prefix): dtypes[tensor] for tensor, parameter in self.norms.items()},
            refinement,
            held_out=len(calls) - len(places),
            transposed={layer: plan.layer.transposed for layer, plan in self.plans.items()},
            roundings={layer: self._rounding(layer, latent) for layer, latent in self._latents.items()},
            seed=seed_of(self.job.recipe.seed, self.name),
            on_step=lambda step, loss: self._say(f"matching, step {step} of {refinement.steps}, loss {loss:.4f}"),
            places=places,
            group=self.group,
        )

        def measure(layers: tuple[str, ...]) -> None:
            (layer,) = layers
            before, factors = self.solved[layer], matched.factors[layer]
            self.solved[layer] = self._measured(layer, factors, before.errors, before.output_errors, before.log_step)
            del self._encoded[layer]

        self._latents.clear()
        self._by_owners([(layer,) for layer in matched.factors], measure, lambda report: None)
        self._install()
        norms = {name: self.assembly.model.get_parameter(name).detach() for name in self.norms.values()}
        for name, value in self.group.broadcast(0, norms).items():
            self._set_norm(name, value)
        return {"name": self.name, **{name: getattr(matched, name) for name in LOSSES}}

    def _rounding(self, layer: str, latent: Tensor) -> Rounding:
        """How the layer's codes came about; they may take the bytes that they take now."""
        plan, most = self.plans[layer], self.encode(layer)[0].bytes_after
        before, width, sparse = self.solved[layer], plan.width, plan.sparse
        if self.job.start is not None and isinstance(before.factors, LowRankCodes):
            width, sparse = made_with(self.job.start, plan, before.factors)

        def fits(factors: LowRankCodes) -> bool:
            report, _ = encode(plan, replace(before, factors=factors), factors.U.dtype)
            return report.bytes_after <= most

        return Rounding(latent, width, sparse, fits)

    # --- what is written ------------------------------------------------------------------------

    def encode(self, layer: str) -> tuple[LayerReport, dict[str, Tensor]]:
        """The layer's line of the report, with its entry in config.json, and its tensors by suffix."""
        if layer not in self._encoded:  # asked for when it is solved, and again when it is written
            one = self.solved[layer]
            report, tensors = encode(self.plans[layer], one, one.factors.U.dtype)
            self._encoded[layer] = replace(report, tokens=self._tokens.get(layer)), tensors
        return self._encoded[layer]

    def norm(self, tensor: str) -> Tensor:
        """The norm that is called `tensor` on disk, as it will be stored."""
        value: Tensor = self.assembly.model.get_parameter(self.norms[tensor]).detach()
        return value.to(TORCH_DTYPES[self.job.source.entries[tensor].dtype]).cpu().contiguous()

    # --------------------------------------------------------------------------------------------

    def _stored(self, layer: str) -> Tensor:
        return self.assembly.read(self.plans[layer].layer.tensor)

    def _measured(
        self,
        layer: str,
        factors: LowRankSparse | LowRankCodes,
        errors: Sequence[float],
        output_errors: Sequence[float],
        log_step: float | None = None,
    ) -> Decomposition:
        W = as_matrix(self._stored(layer), self.plans[layer].layer, self.job.device)
        weight, residual = squared_norm(W), squared_norm(W - factors.dense())
        return Decomposition(
            factors,
            (*errors, relative_error(residual, weight)),
            weight,
            residual,
            tuple(output_errors),
            self._unseen_error(layer, factors),
            log_step,
        )

    def _unseen_error(self, layer: str, factors: LowRankSparse | LowRankCodes) -> float | None:
        """Of the layer's output in windows that are held out, None if none of them reaches it."""
        H = self._held_out.get(layer)
        if H is None:
            return None
        W = as_matrix(self._stored(layer), self.plans[layer].layer, self.job.device)
        return output_error(W - factors.dense(), W, H)

    def _install(self) -> None:
        for layer, one in self.solved.items():
            self._set_weight(layer, one.factors)

    def _set_weight(self, layer: str, factors: LowRankSparse | LowRankCodes) -> None:
        if self.plans[layer].layer.rows:
            return  # what blocks are calibrated with is what the dense model reads
        W = factors.dense()
        linear: Any = self.module.get_submodule(layer)
        with torch.no_grad():
            linear.weight.copy_(W.T if self.plans[layer].layer.transposed else W)

    def _set_norm(self, parameter: str, value: Tensor) -> None:
        with torch.no_grad():
            self.assembly.model.get_parameter(parameter).copy_(value)
