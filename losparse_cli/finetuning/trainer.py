"""transformers' Trainer with three things added: distillation, pruning of S, and a stop where the loss is no number.

Trainer brings mixed precision, gradient accumulation and checkpointing, several devices and FSDP through `torchrun` or
`accelerate launch`, and resuming with every state there is; a loop of our own would be worse in all of these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from ..errors import TrainingError, UsageError
from ..models.device import chosen_precision
from ..tasks.heads import refusals
from ..tasks.tokens import LABELS
from .conversion import coded_modules
from .distillation import distance
from .pruner import Pruner
from .request import Finetuning
from .states import last_state

OF_FACTORS = 20.0
"""Learning rate of the factors of coded rows, relative to their size, over that of all other weights."""


@dataclass(frozen=True)
class Step:
    """What is known after an optimizer step. remaining: of S, over the weights. scores: of the last evaluation."""

    step: int
    total: int
    epoch: float
    loss: float
    remaining: float
    scores: dict[str, float]


class _Pruning(transformers.TrainerCallback):  # type: ignore[misc]
    def __init__(self, pruner: Pruner) -> None:
        self._pruner = pruner

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._pruner.watch()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._pruner.prune(state.global_step + 1)


class _Telling(transformers.TrainerCallback):  # type: ignore[misc]
    def __init__(self, pruner: Pruner, hear: Callable[[Step], None]) -> None:
        self._pruner, self._hear = pruner, hear
        self.loss = 0.0
        self.scores: dict[str, float] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        remaining = self._pruner.remaining()
        self._hear(
            Step(state.global_step, state.max_steps, state.epoch or 0.0, self.loss, remaining, dict(self.scores))
        )


class FinetuneTrainer(transformers.Trainer):  # type: ignore[misc]
    """Trains a model whose targeted layers are TrainedLinear.

    score: the task's scores of the model, called once an epoch and at the end. within: what forward passes run in.
    TrainingError if the loss stops being a number.
    """

    def __init__(
        self,
        model: nn.Module,
        how: Finetuning,
        pruner: Pruner,
        *,
        folder: Path,
        steps: int,
        device: torch.device,
        train: Any,
        collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]],
        teacher: nn.Module | None = None,
        score: Callable[[nn.Module], dict[str, float]] | None = None,
        within: Callable[[], AbstractContextManager[Any]] = nullcontext,
        on_step: Callable[[Step], None] = lambda step: None,
    ) -> None:
        precision = chosen_precision(how.precision, device)
        settings = transformers.TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=how.batch_size,
            gradient_accumulation_steps=how.gradient_accumulation_steps,
            learning_rate=how.learning_rate,
            lr_scheduler_type=how.lr_scheduler,
            warmup_steps=how.warmup_steps if how.warmup_steps < 1 else int(how.warmup_steps),
            weight_decay=how.weight_decay,
            # Without a limit gradients of float16 would keep their scale, and importance with them.
            max_grad_norm=how.max_grad_norm or (math.inf if precision == "float16" else 0.0),
            bf16=precision == "bfloat16",
            fp16=precision == "float16",
            seed=how.seed,
            use_cpu=device.type == "cpu",
            save_strategy="epoch" if how.save_steps is None else "steps",
            save_steps=how.save_steps or 500,
            save_total_limit=1,
            eval_strategy="no" if score is None else "epoch",
            logging_strategy="steps",
            logging_steps=10,
            disable_tqdm=True,
            report_to="none",
            remove_unused_columns=False,
            dataloader_pin_memory=device.type == "cuda",
            ddp_find_unused_parameters=how.objective == "distill" and not how.distill_weight,  # of the head
            **_renamed(how),
        )
        self._telling = _Telling(pruner, on_step)
        super().__init__(
            model=model,
            args=settings,
            train_dataset=train,
            eval_dataset=train if score is not None else None,  # evaluation is ours, but Trainer insists
            data_collator=collate,
            callbacks=[_Pruning(pruner), self._telling],
        )
        check_sharding(getattr(self.accelerator.state, "fsdp_plugin", None))
        self.remove_callback(transformers.PrinterCallback)
        self.loss_is_scaled_for_ga = False  # of newer versions
        self.model_accepts_loss_kwargs = False  # a mean over the batch, which Trainer divides when it accumulates
        self._how, self._teacher, self._score, self._within = how, teacher, score, within
        if teacher is not None:
            teacher.eval().requires_grad_(False).to(self.args.device)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The factors of coded rows are small beside other weights: each layer's have a learning rate of their size."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        factors = {id(module.weight): module.weight for module in coded_modules(self.model).values()}
        for group in list(optimizer.param_groups):
            own = [p for p in group["params"] if id(p) in factors]
            group["params"] = [p for p in group["params"] if id(p) not in factors]
            for p in own:
                rate = OF_FACTORS * group["lr"] * float(p.detach().square().mean().sqrt())
                optimizer.add_param_group({**group, "params": [p], "lr": rate, "weight_decay": 0.0})
        return optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Where lengths are grouped an order that is known: transformers' own cannot be drawn again by a run that goes
        on in the middle of an epoch."""
        if not self._how.group_by_length:
            return super()._get_train_sampler(train_dataset)
        lengths = [len(item["input_ids"]) for item in self.train_dataset]
        return _LikeLengths(lengths, self.args.train_batch_size * self.args.gradient_accumulation_steps, self.args.seed)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        how, labels = self._how, {}
        if how.objective == "distill":  # so that the task's loss is not computed in vain
            labels = {name: inputs.pop(name) for name in LABELS if name in inputs}
            shift = getattr(self.accelerator.unwrap_model(model), "prepare_decoder_input_ids_from_labels", None)
            # Encoder-decoders that classify have no such method, and no need of it.
            if shift is not None and "labels" in labels and "decoder_input_ids" not in inputs:
                inputs["decoder_input_ids"] = shift(labels["labels"])
        options = {"output_hidden_states": True} if how.hidden_weight and self._teacher is not None else {}
        with refusals(self.accelerator.unwrap_model(model)):
            outputs = model(**inputs, **options)
        loss = torch.zeros((), device=self.args.device) if how.objective == "distill" else outputs["loss"]
        if self._teacher is not None:
            given = {name: x for name, x in inputs.items() if name != "labels" or _is_encoder_decoder(model)}
            with torch.no_grad():
                goal = self._teacher(**given, **options)
            loss = loss + distance(outputs, goal, inputs | labels, how)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with self._within():
            loss: Tensor = super().training_step(*args, **kwargs)
        value = float(loss) * self.current_gradient_accumulation_steps  # of which an epoch's last step has fewer
        if not math.isfinite(value):
            raise TrainingError(f"The loss became {value} at step {self.state.global_step + 1}. {self._kept()}")
        self._telling.loss = value
        return loss

    def _kept(self) -> str:
        """What is left of a run that went wrong, and how another is begun in its place."""
        last = last_state(Path(self.args.output_dir))
        said = f"The state of step {last[0]} is kept in {last[1]}." if last else "No state had been saved before."
        anew = "Start anew with --resume never and" if last else "Start anew with"
        return f"{said} {anew} a lower --learning-rate, or --precision float32."

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        assert self._score is not None, "evaluated only with scores"
        with self._within():
            found = self._score(self.accelerator.unwrap_model(self.model))
        self._telling.scores = found
        logged = {f"eval_{name}": value for name, value in found.items()}
        self.log(dict(logged))
        return logged

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Whole, also where FSDP keeps it in parts: the result is made from it by one process."""
        if not self.is_fsdp_enabled:
            self._save(output_dir)
            return
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state: Any = get_model_state_dict(self.model, options=options)  # which all processes take part in
        self._save(output_dir, state)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """The state as it is in training; transformers' own way would write a model that its classes can load."""
        if not self.args.should_save:
            return
        from safetensors.torch import save_file, save_model

        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model)
        values = dict(model.named_parameters()) if state_dict is None else state_dict
        bad = [name for name, value in values.items() if not bool(torch.isfinite(value).all())]
        if bad:
            raise TrainingError(f"After step {self.state.global_step} {bad[0]} is not finite. {self._kept()}")
        path = str(folder / "model.safetensors")
        if state_dict is None:
            save_model(model, path)
        else:
            save_file({name: value.clone() for name, value in state_dict.items()}, path)  # tied ones share memory


class _LikeLengths(Sampler[int]):
    """Batches of like length, in an order that seed and epoch decide."""

    def __init__(self, lengths: list[int], batch: int, seed: int) -> None:
        self._lengths, self._batch, self._seed, self._epoch = lengths, batch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        return iter(get_length_grouped_indices(self._lengths, self._batch, generator=generator))


def check_sharding(plugin: Any) -> None:
    """UsageError if FSDP is to flatten tensors, as its first version does: a neuron would not be found in them."""
    if plugin is not None and plugin.fsdp_version == 1:
        raise UsageError(
            "FSDP of version 1 takes weights apart without regard to their neurons. Give --fsdp_version 2 to "
            "accelerate launch, or set FSDP_VERSION=2."
        )


def _renamed(how: Finetuning) -> dict[str, Any]:
    """Settings that have other names in older versions of transformers."""
    known = transformers.TrainingArguments.__dataclass_fields__
    found: dict[str, Any] = {}
    if how.gradient_checkpointing:
        found["activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"] = True
    return found


def _is_encoder_decoder(model: nn.Module) -> bool:
    inner: Any = getattr(model, "module", model)
    return bool(getattr(inner.config, "is_encoder_decoder", False))
