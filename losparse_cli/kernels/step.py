"""One token through a decoder as a list of operations that step.h runs in one call."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..shim.installed import kernels
from ..shim.linear import LowRankSparseLinear
from ..shim.packed import bits_of
from .cpu import DTYPES
from .dispatch import AVX512, WIDEST, Kernels, plain
from .native import Layer, library

TOGETHER = 3
"""Most layers that read the same x in one operation."""
NORM, PRODUCT, ROTATE, ATTEND, GATE, ADD, EXPERTS, SHARE = range(8)
ACTIVATIONS = {"silu": 0, "swish": 0, "gelu_pytorch_tanh": 1, "relu": 2}
CLAMPED = 3
CODED, SPREAD, KEPT_COLUMNS, KEPT_ROWS, DENSE = range(5)


class Step(ctypes.Structure):
    """`Step` of step.h."""

    _fields_ = (
        ("memory", ctypes.c_void_p),
        ("scores", ctypes.c_void_p),
        ("narrow", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("position", ctypes.c_int64),
        ("widest", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("level", ctypes.c_int32),
    )


class Part(ctypes.Structure):
    """`Part` of step.h."""

    _fields_ = (("operations", ctypes.c_void_p), ("count", ctypes.c_int64))


class Operation(ctypes.Structure):
    """`Operation` of step.h."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("choice", ctypes.c_int32),
        ("source", ctypes.c_int64),
        ("to", ctypes.c_int64 * TOGETHER),
        ("width", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("layers", ctypes.POINTER(Layer) * TOGETHER),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("kept", ctypes.c_int64),
        ("room", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("number", ctypes.c_float),
        ("parts", ctypes.POINTER(Part)),
        ("inside", ctypes.POINTER(Step)),
    )


@dataclass(frozen=True)
class Expert:
    """into: its gate and up; or both as one layer, its outputs (gate, up) in turns. biases: of these and of `down`,
    where the layers themselves have none."""

    into: tuple[nn.Module, ...]
    down: nn.Module
    biases: tuple[Tensor, ...] = ()


class Unsuited(Exception):
    """Why a model cannot be run as such a list."""


class Program:
    """Operations on vectors of float32, one row for each of `rows` sequences, in the order they are run in.

    Vectors are named by where they begin (`vector`). Keys and values are held in `dtype`, with `room` positions, which
    `grow` extends. What products read and write is `dtype`, too, as in the model itself.
    """

    def __init__(self, dtype: torch.dtype, rows: int, room: int) -> None:
        """Unsuited where there are no kernels or not for this dtype."""
        code = library()
        makers = kernels()
        if code is None or dtype not in DTYPES or not isinstance(makers, Kernels) or makers.forced:
            raise Unsuited(f"there are no kernels for {dtype}" if code else "no kernels were compiled")
        self._makers, self._code, self.dtype, self.rows, self.room = makers, code, dtype, rows, room
        self._operations: list[Operation] = []
        self._held: list[Any] = []  # whose memory the operations name
        self._caches: list[tuple[Operation, Tensor, Tensor]] = []
        self._widths: dict[int, int] = {}  # of the vector that begins there
        self._size, self._widest, self._heads = 0, 1, 1
        self._array: Any = None
        self._between: dict[int, tuple[int, int]] = {}  # vectors of `feed_forward`, by the width of its first
        self._inside: _Inside | None = None
        self.step = Step()

    # --- what is written down ---------------------------------------------------------------------------

    def vector(self, width: int) -> int:
        """Room for a vector of this width in each row."""
        begin = self._size
        self._widths[begin] = width
        self._size += -(-width // 16) * 16
        return begin

    def norm(self, source: int, to: int, weight: Tensor, epsilon: float, count: int = 1) -> None:
        """Each of `count` vectors side by side over its root mean square, times weight (width,)."""
        if not plain(weight) or weight.device.type != "cpu":
            raise Unsuited("a norm's weight is no ordinary tensor on a CPU")
        weight = weight.detach().float().contiguous()
        if not weight.numel() * count == self._widths[source] == self._widths[to]:
            raise Unsuited("a norm is as wide as no vector there is")
        self._add(NORM, source, (to,), width=weight.numel(), count=count, weight=weight.data_ptr(), number=epsilon)
        self._held.append(weight)

    def products(
        self, layers: Sequence[nn.Module], source: int, to: Sequence[int], biases: Sequence[Tensor] = ()
    ) -> None:
        """What each layer makes of the same vector, with its own bias or that of `biases`. Unsuited for a layer that
        there is no kernel for."""
        pending: list[tuple[Layer, int, int]] = []
        for k, (layer, place) in enumerate(zip(layers, to, strict=True)):
            described, choice = self._described(layer, biases[k] if biases else None)
            if (described.n, described.m) != (self._widths[source], self._widths[place]):
                raise Unsuited("a layer is of another size than its configuration says")
            self._widest = max(self._widest, described.n, described.m * TOGETHER)
            pending.append((described, choice, place))
        while pending:
            choice = pending[0][1]
            some = [part for part in pending if part[1] == choice][:TOGETHER]
            pending = [part for part in pending if part not in some]
            operation = self._add(PRODUCT, source, [part[2] for part in some], choice=choice, count=len(some))
            for k, (described, *_) in enumerate(some):
                operation.layers[k] = ctypes.pointer(described)

    def rotate(self, place: int, heads: int, turn: Tensor) -> None:
        """Each head turned by `turn`: (2, width), cosines and sines, which the caller changes from step to step."""
        self._add(ROTATE, place, (place,), width=turn.shape[1], count=heads, weight=turn.data_ptr())
        self._held.append(turn)

    def attend(
        self, query: int, key: int, value: int, to: int, *, heads: int, kept: int, width: int, scale: float,
        window: int, sinks: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Attention of `heads` heads to the `kept` ones of keys and values up to this position, which they join.

        window: how many positions back, this one included; 0: all. sinks: (heads,), a score for each beside those of
        the positions, which takes a share of the attention and gives nothing.
        """
        keys, values = (torch.zeros(self.rows, kept, self.room, width, dtype=self.dtype) for _ in range(2))
        operation = self._add(
            ATTEND, query, (to, key, value), width=width, count=heads, kept=kept, window=window, number=scale
        )
        if sinks is not None:
            sinks = sinks.detach().float().contiguous()
            if sinks.shape != (heads,):
                raise Unsuited("it has another number of sinks than of heads")
            operation.weight = sinks.data_ptr()
            self._held.append(sinks)
        self._heads = max(self._heads, heads)
        self._caches.append((operation, keys, values))

    def gate(self, source: int, to: int, width: int, activation: str) -> None:
        """to = activation(source) * to."""
        self._add(GATE, source, (to,), width=width, choice=ACTIVATIONS[activation])

    def clamped_gate(self, source: int, to: int, width: int, settings: Tensor) -> None:
        """Of source (width, 2), gates and what they let through: to = (up + 1) gate sigmoid(steepness gate), with
        gate at most `limit`, and up within it. settings: (2,), float32, limit and steepness."""
        self._add(GATE, source, (to,), width=width, choice=CLAMPED, weight=settings.data_ptr())
        self._held.append(settings)

    def feed_forward(self, layers: Expert, source: int, to: int, activation: str | Tensor) -> None:
        """to = what down makes of gate and up of source. activation: as of `gate`, or the settings of `clamped_gate`,
        where gate and up are one layer. Unsuited as `products`."""
        width = getattr(layers.down, "in_features", None)
        if not isinstance(width, int):
            raise Unsuited(f"it holds a layer of type {type(layers.down).__name__}")
        first = 2 * width if isinstance(activation, Tensor) else width
        if first not in self._between:
            self._between[first] = self.vector(first), self.vector(width)
        gate, up = self._between[first]
        if isinstance(activation, Tensor):
            self.products(layers.into, source, (gate,), layers.biases[:-1])
            self.clamped_gate(gate, up, width, activation)
        else:
            self.products(layers.into, source, (gate, up))
            self.gate(gate, up, width, activation)
        self.products((layers.down,), up, (to,), layers.biases[-1:])

    def add(self, source: int, to: int, width: int) -> None:
        """to = to + source."""
        self._add(ADD, source, (to,), width=width)

    def experts(
        self, logits: int, source: int, to: int, experts: Sequence[Expert], *, most: int, whole: bool,
        activation: str | Tensor,
    ) -> None:  # fmt: skip
        """to = the sum of what the `most` experts with the largest logits make of source, by their softmax.

        whole: shares of the chosen sum to 1; else those of all do. activation: as of `feed_forward`. Unsuited as
        `products`.
        """
        if not 0 < most <= len(experts) == self._widths[logits]:
            raise Unsuited("its router knows another number of experts than there are")
        hidden = self._widths[source]
        if self._inside is None:
            self._inside = _Inside(self.dtype, hidden)
        inside = self._inside
        parts = (Part * len(experts))(*(inside.part(expert, activation) for expert in experts))
        operation = self._add(
            EXPERTS, logits, (source, to, inside.made), width=hidden, count=len(experts), kept=most, choice=int(whole)
        )
        operation.parts, operation.inside = parts, ctypes.pointer(inside.step)
        self._held.append(parts)

    def share(self, source: int, to: int, width: int) -> None:
        """to = to times the sigmoid of source, one number a row."""
        self._add(SHARE, source, (to,), width=width)

    def _add(self, kind: int, source: int, to: Sequence[int], **fields: Any) -> Operation:
        operation = Operation(kind=kind, source=source, **fields)
        for k, place in enumerate(to):
            operation.to[k] = place
        self._operations.append(operation)
        return operation

    def _described(self, layer: nn.Module, given: Tensor | None = None) -> tuple[Layer, int]:
        """The layer as step.h sees it, and which kernel takes it. given: its bias, if it has none of its own."""
        if type(layer) is nn.Linear:
            W, bias = layer.weight.detach(), layer.bias if given is None else given
            self._check(W, *(() if bias is None else (bias,)))
            self._held.append((W, bias))
            m, n = W.shape
            if bias is not None and bias.shape != (m,):
                raise Unsuited("a layer's bias is of another size than its outputs")
            address = 0 if bias is None else bias.data_ptr()
            return Layer(V=W.data_ptr(), bias=address, m=m, n=n, rank=m, dtype=DTYPES[self.dtype]), DENSE
        if type(layer) is not LowRankSparseLinear:
            raise Unsuited(f"it holds a layer of type {type(layer).__name__}")
        index, starts = layer._index_and_starts()
        parts = (layer.weight, index, starts, layer.U, layer.V, layer.bias if given is None else given)
        self._check(layer.weight)
        self._held.append(parts)
        described = self._makers.described(*parts, layer.spec.shape, layer.form)
        choice = self._choice(layer.form)
        if described is None or choice is None:
            raise Unsuited(f"this processor has no kernel for S as {layer.form}")
        if choice != CODED and described.n >= WIDEST:
            raise Unsuited(f"it holds a layer of {described.n} inputs")
        return described, choice

    def _check(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            ordinary = plain(tensor) and tensor.is_contiguous()
            if not ordinary or tensor.dtype != self.dtype or tensor.device.type != "cpu":
                raise Unsuited(f"its weights are not all {self.dtype} on a CPU")

    def _choice(self, form: str) -> int | None:
        if bits_of(form):
            return CODED
        if form in ("bits", "gaps"):
            return SPREAD
        blocks = {"columns": KEPT_COLUMNS, "rows": KEPT_ROWS} if self._code.level >= AVX512 else {}
        return blocks.get(form)

    # --- running it -------------------------------------------------------------------------------------

    def begin(self, past: Sequence[tuple[Tensor, Tensor]], position: int) -> None:
        """Take over keys and values (rows, kept, some, width) of the last positions before this one, a pair a layer."""
        for (_, *caches), pair in zip(self._caches, past, strict=True):
            for cache, given in zip(caches, pair, strict=True):
                cache[:, :, position - given.shape[2] : position] = given
        self.position = position
        self.allocate()
        self._array = (Operation * len(self._operations))(*self._operations)
        for k, operation in enumerate(self._operations):
            self._operations[k] = self._array[k]  # the same memory from now on
            self._caches = [
                (self._array[k] if known is operation else known, keys, values) for known, keys, values in self._caches
            ]
        self._place()

    def allocate(self) -> None:
        """Memory for all vectors, zeros."""
        self._memory = torch.zeros(self.rows * self._size, dtype=torch.float32)
        self._narrow = torch.zeros(2 * self.rows * self._widest, dtype=self.dtype)
        if self._inside is not None:
            self._inside.allocate()

    def ready(self) -> Step:
        """What step.h is to know of this program, now."""
        step = self.step
        step.memory, step.narrow, step.widest = self._memory.data_ptr(), self._narrow.data_ptr(), self._widest
        step.rows, step.dtype = self.rows, DTYPES[self.dtype]
        step.threads, step.level = torch.get_num_threads(), self._code.level
        if self._inside is not None:
            self._inside.ready()
        return step

    def _place(self) -> None:
        self._scores = torch.zeros(self.rows * self._heads * self.room, dtype=torch.float32)
        for operation, keys, values in self._caches:
            operation.keys, operation.values, operation.room = keys.data_ptr(), values.data_ptr(), self.room

    def grow(self, room: int) -> None:
        """Make room for so many positions."""
        for k, (operation, keys, values) in enumerate(self._caches):
            larger = []
            for cache in (keys, values):
                new = cache.new_zeros(*cache.shape[:2], room, cache.shape[3])
                new[:, :, : self.room] = cache
                larger.append(new)
            self._caches[k] = (operation, larger[0], larger[1])
        self.room = room
        self._place()

    def at(self, place: int, width: int) -> Tensor:
        """The vector there, (rows, width), to be read and written."""
        return self._memory[place * self.rows :][: width * self.rows].view(self.rows, width)

    def run(self) -> bool:
        """All operations for the next position; False where a number was none or infinite. MemoryError."""
        if self.position >= self.room:
            self.grow(2 * self.room)
        step = self.ready()
        step.scores, step.position = self._scores.data_ptr(), self.position
        failed = self._code.step(self._array, len(self._array), ctypes.byref(step))
        if failed == 1:
            raise MemoryError("there is no memory for a product")
        self.position += 1
        return not failed


class _Inside(Program):
    """Experts, each by itself, on one row: from the vector at 0 to that at `made`."""

    def __init__(self, dtype: torch.dtype, hidden: int) -> None:
        super().__init__(dtype, 1, 0)
        self._fed, self.made = self.vector(hidden), self.vector(hidden)

    def part(self, expert: Expert, activation: str | Tensor) -> Part:
        """What one expert does."""
        self.feed_forward(expert, self._fed, self.made, activation)
        array = (Operation * len(self._operations))(*self._operations)
        self._held.append(array)
        self._operations.clear()
        return Part(ctypes.addressof(array), len(array))
