"""The skeleton filled with weights, one part at a time: from the checkpoint, in float32."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.activations import Activations
from ..checkpoint.reader import require_finite
from ..checkpoint.source import Checkpoint
from ..errors import CheckpointError
from ..models.blocks import Call, block_of, changed, run_block
from ..models.names import NameMap
from ..models.reading import output_embeddings
from ..models.route import Route
from ..models.skeleton import empty_model
from ..shim.experts import as_if_fused
from .plan import Job
from .slices import parted


class Assembly:
    """A model of which only the parts in use have weights; the rest stays on the meta device.

    Buffers that no file holds are computed as transformers computes them at load.
    """

    def __init__(self, model: Any, checkpoint: Checkpoint, device: torch.device) -> None:
        self.model = model.float()
        self._checkpoint, self._device = checkpoint, device
        self._names = NameMap(model, checkpoint.entries)
        self._files = {file.path: file for file in checkpoint.files}
        for name, parameter in list(model.named_parameters()):
            if not parameter.is_meta:  # made by a constructor that knows no meta device, and holding nothing
                self._set([name], nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False))
        self._meta: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        self._twins: dict[int, list[str]] = {}
        for name, parameter in self._meta.items():
            self._twins.setdefault(id(parameter), []).append(name)
        self._parameters = {stored[0]: name for name, stored in self._names.disk.items() if name in self._meta}
        self._make_buffers()

    def _make_buffers(self) -> None:
        """As transformers does: all modules are initialized, whichever of them fills a buffer, and it may be another's.

        What its initialization leaves alone would be whatever lies in memory; here it is zero.
        """
        buffers = {name: buffer for name, buffer in self.model.named_buffers() if buffer.is_meta}
        if not buffers:
            return
        for parameter in self.model.parameters():
            parameter._is_hf_initialized = True
        for name, buffer in buffers.items():
            stored = self._names.disk.get(name, [])
            made = torch.zeros_like(buffer, device=self._device)
            if stored:
                made = self.read(stored[0]).to(self._device, buffer.dtype)
                made._is_hf_initialized = True  # type: ignore[attr-defined]
            self._set([name], made)
        for module in self.model.modules():
            vars(module).pop("_is_hf_initialized", None)  # as its constructor left it, on the meta device
        with as_if_fused(self.model):
            self.model.initialize_weights()

    def parameter(self, tensor: str) -> str | None:
        """The parameter that the tensor on disk becomes as it stands, None if there is none."""
        return self._parameters.get(tensor)

    def read(self, tensor: str) -> Tensor:
        """A tensor of the checkpoint as it is stored."""
        entry = self._checkpoint.entries[tensor]
        return self._files[entry.path].read(entry)

    def _sound(self, tensor: str) -> Tensor:
        """As `read`; CheckpointError if not all of it is finite, of which nothing could be computed."""
        value = self.read(tensor)
        if value.is_floating_point():
            remedy = "Repair the checkpoint: nothing can be calibrated with it."
            require_finite(value, self._checkpoint.entries[tensor], remedy)
        return value

    def load(self, names: Collection[str]) -> None:
        """Give the parameters `names` their weights, in float32.

        CheckpointError names one that no file holds, or that is not finite.
        """
        ready: dict[str, Tensor] = {}
        for name in names:
            if self.model.get_parameter(name).is_meta:
                twins = self._twins[id(self._meta[name])]
                value = ready.get(name)
                if value is None:
                    ready |= self._find(twins)
                    value = next(ready[twin] for twin in twins if twin in ready)
                self._set(twins, nn.Parameter(value.to(self._device, torch.float32), requires_grad=False))

    def _find(self, twins: list[str]) -> dict[str, Tensor]:
        for name in twins:
            stored = self._names.disk.get(name)
            if stored:
                return {name: self._sound(stored[0])}
            if name in self._names.converted:
                return self._names.convert(name, self._sound)
        raise CheckpointError(
            f"The tensor {twins[0]} is missing from {self._checkpoint.folder}. Download the checkpoint again."
        )

    def drop(self, names: Collection[str]) -> None:
        """Take the weights of the parameters `names` away again."""
        for name in names:
            self._set([name], self._meta[name])

    def _set(self, names: list[str], parameter: Tensor) -> None:
        for name in names:
            module, _, key = name.rpartition(".")
            setattr(self.model.get_submodule(module), key, parameter)


def calibration_model(job: Job) -> Assembly:
    """The job's model without weights, told to keep no cache."""
    model = empty_model(
        job.source.folder, job.source.config, parted(job.source), trust_remote_code=job.trust_remote_code
    )
    keeps_no_cache(model)
    return Assembly(model, job.source, job.device)


def keeps_no_cache(model: Any) -> None:
    """Tell a model to keep none: one would let every batch attend to those before it."""
    for module in model.modules():
        if hasattr(module, "config"):
            module.config.use_cache = False


def activations_of(job: Job, folder: Path, fixed_bytes: int) -> Activations:
    """What flows from block to block, in the memory that the job may take beside `fixed_bytes`, or in `folder`."""
    return Activations(folder, max(0, job.memory - fixed_bytes))


def run_calls(module: nn.Module, calls: Sequence[Call], activations: Activations) -> None:
    """Give each call of a block what the block returns for it."""
    with torch.no_grad():
        for call in calls:
            if call.absent:
                continue
            given = {id(value) for value in (*call.args, *call.kwargs.values())}
            # Beside activations T5 hands the biases of all positions from its first block to the last.
            call.output = changed(
                run_block(module, call),
                lambda tensor, given=given: tensor if id(tensor) in given else activations.keep(tensor),  # type: ignore[misc]
            )
            activations.release()


def parameters_by_block(model: Any, route: Route) -> tuple[dict[str, list[str]], list[str]]:
    """Block -> its parameters, of those that text reaches; and the parameters in no block, the head's too."""
    blocks: dict[str, list[str]] = {block: [] for block in route.blocks}
    outside: list[str] = []
    for name, _ in model.named_parameters():
        block = block_of(name, (*route.blocks, *route.unreached))
        if block is None:
            outside.append(name)
        elif block in blocks:
            blocks[block].append(name)
    return blocks, outside


def parameters_outside(model: Any, route: Route) -> list[str]:
    """Parameters outside the blocks that run before the last block: all but the output head's own."""
    _, outside = parameters_by_block(model, route)
    head = output_embeddings(model)
    own = {id(p) for p in head.parameters()} if head is not None else set()
    # Embeddings that the head is tied to are read before: the decoder's, where the encoder has others.
    own -= {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    return [name for name in outside if id(model.get_parameter(name)) not in own]
