"""What `bench` finds. Times are in milliseconds, each the median of many; sizes in bytes; rates in tokens a second."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

BUSY = 0.5


@dataclass(frozen=True)
class LayerSpeed:
    """One shape of layer at one number of rows of x, beside nn.Linear with as many outputs and inputs.

    shape: (out, in). count: layers of this shape in the model, of which rank, density and nbytes are means. form: what
    the index of S is in memory. nbytes: of the compressed layer in memory, which are read for each product;
    dense_nbytes: of the dense weight.
    """

    shape: tuple[int, int]
    count: int
    rank: int
    density: float
    pattern: str
    form: str
    rows: int
    milliseconds: float
    dense_milliseconds: float
    nbytes: int
    dense_nbytes: int

    @property
    def speedup(self) -> float:
        return self.dense_milliseconds / self.milliseconds

    @property
    def bits(self) -> float:
        """Of a weight in memory, everything counted."""
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])

    @property
    def bandwidth(self) -> float:
        """Bytes of the layer read in a second."""
        return self.nbytes / self.milliseconds * 1e3

    @property
    def dense_bandwidth(self) -> float:
        return self.dense_nbytes / self.dense_milliseconds * 1e3


@dataclass(frozen=True)
class ModelSpeed:
    """One model. prefill, decode: tokens a second, of all sequences together; decode is None without generation.

    disk: bytes of the tensors in its weight files. tensors: of its parameters and buffers, in use; None of a model that
    is not torch's. resident: growth of a fresh process that loads and uses it, after all imports, or of llama.cpp's
    whole process; None where the system does not say, and on GPUs. token_bytes: of weights that each new token reads;
    None where that depends on the token, as with experts. plain: why `generation.loop.decode` left it to transformers'
    loop; None where it did not.
    """

    prefill: float
    decode: float | None
    disk: int
    tensors: int | None
    resident: int | None = None
    token_bytes: int | None = None
    plain: str | None = None


@dataclass(frozen=True)
class BenchReport:
    """Figures of one run. copy_bandwidth: bytes read and written in a second by a large copy with the same threads.

    load: how many threads of others wanted a core in the minute before; None where the system does not say.
    new_tokens: 0 of a model that writes none. against: the dense model, peer_file: what llama.cpp ran; None if there is
    none to compare with.
    """

    name: str
    device: str
    dtype: str
    threads: int
    processor: str
    copy_bandwidth: float
    batch: int
    prompt: int
    new_tokens: int
    against: str | None = None
    layers: tuple[LayerSpeed, ...] = ()
    compressed: ModelSpeed | None = None
    dense: ModelSpeed | None = None
    load: float | None = None
    peer_file: str | None = None
    peer: ModelSpeed | None = None

    @property
    def busy(self) -> bool:
        """Whether others used so much of the machine that short times mean little: threads wait for each other."""
        return self.load is not None and self.load > BUSY

    def with_(self, **fields: Any) -> BenchReport:
        return replace(self, **fields)

    @property
    def shapes(self) -> list[list[LayerSpeed]]:
        """The layers shape by shape: in a list, the cases that differ in nothing but the rows of x."""
        found: list[list[LayerSpeed]] = []
        for x in self.layers:
            if not found or x.rows in {other.rows for other in found[-1]} or x.shape != found[-1][0].shape:
                found.append([])
            found[-1].append(x)
        return found

    @property
    def ratios(self) -> dict[str, float | None]:
        """Compressed over dense: speed-ups, better above 1, and shares of bytes, better below; None if not known."""
        return self._over(self.dense)

    @property
    def peer_ratios(self) -> dict[str, float | None]:
        """The same over llama.cpp."""
        return self._over(self.peer)

    def _over(self, other: ModelSpeed | None) -> dict[str, float | None]:
        names = {"prefill": "prefill_speedup", "decode": "decode_speedup"}
        names |= {name: f"{name}_share" for name in ("disk", "tensors", "resident")} | {"token_bytes": "token_share"}
        return {ratio: _over(getattr(self.compressed, name, None), getattr(other, name, None))
                for name, ratio in names.items()}  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """JSON form, with the ratios."""
        found = asdict(self)
        for entry, layer in zip(found["layers"], self.layers, strict=True):
            entry |= {
                "speedup": layer.speedup,
                "bits": layer.bits,
                "bandwidth": layer.bandwidth,
                "share_of_copy": layer.bandwidth / self.copy_bandwidth,
            }
        return found | self.ratios | {"peer_ratios": self.peer_ratios}


def _over(ours: float | None, dense: float | None) -> float | None:
    return ours / dense if ours is not None and dense else None
