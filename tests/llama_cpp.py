"""llama.cpp as a peer: logits and tokens of a GGUF file, by the library in the wheel `xllamacpp`."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

AVAILABLE = importlib.util.find_spec("xllamacpp") is not None
THREADS = 2


class _Parameters(ctypes.Structure):
    """Of a model or a context, as the library fills them in: only that they are no longer than this matters."""

    _fields_ = [("fields", ctypes.c_uint64 * 64)]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


def shared_library() -> Any:
    """llama.cpp and ggml, as the wheel has them."""
    spec = importlib.util.find_spec("xllamacpp")
    assert spec is not None
    assert spec.origin is not None
    return ctypes.CDLL(str(next(Path(spec.origin).parent.glob("xllamacpp*.so"))))


@cache
def _library() -> Any:
    library = shared_library()
    pointer, text, whole = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32
    types = {
        "llama_model_default_params": (_Parameters, []),
        "llama_context_default_params": (_Parameters, []),
        "llama_model_load_from_file": (pointer, [text, _Parameters]),
        "llama_init_from_model": (pointer, [pointer, _Parameters]),
        "llama_model_get_vocab": (pointer, [pointer]),
        "llama_vocab_n_tokens": (whole, [pointer]),
        "llama_set_n_threads": (None, [pointer, whole, whole]),
        "llama_batch_init": (_Batch, [whole, whole, whole]),
        "llama_batch_free": (None, [_Batch]),
        "llama_decode": (whole, [pointer, _Batch]),
        "llama_get_logits": (ctypes.POINTER(ctypes.c_float), [pointer]),
        "llama_tokenize": (whole, [pointer, text, whole, pointer, whole, ctypes.c_bool, ctypes.c_bool]),
        "llama_adapter_lora_init": (pointer, [pointer, text]),
        "llama_set_adapters_lora": (whole, [pointer, pointer, ctypes.c_size_t, pointer]),
        "llama_free": (None, [pointer]),
        "llama_model_free": (None, [pointer]),
    }
    for name, (result, arguments) in types.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.ggml_backend_load_all()
    library.llama_backend_init()
    library.said = []
    library.hear = ctypes.CFUNCTYPE(None, ctypes.c_int, text, pointer)(lambda _, line, __: library.said.append(line))
    library.llama_log_set(library.hear, None)
    return library


class LlamaCpp:
    """A GGUF file, and an adapter beside it, in llama.cpp's memory; a context manager."""

    def __init__(self, path: Path, adapter: Path | None = None) -> None:
        self._library = _library()
        self._model = self._library.llama_model_load_from_file(
            str(path).encode(), self._library.llama_model_default_params()
        )
        if not self._model:
            raise ValueError(f"llama.cpp does not load {path}: {b''.join(self._library.said[-8:]).decode()}")
        self._vocabulary = self._library.llama_model_get_vocab(self._model)
        self._lora = None
        if adapter is not None:
            self._lora = self._library.llama_adapter_lora_init(self._model, str(adapter).encode())
            if not self._lora:
                raise ValueError(f"llama.cpp does not load {adapter}")

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *_: object) -> None:
        self._library.llama_model_free(self._model)

    def tokens(self, text: str, *, special: bool = True) -> list[int]:
        """The text's tokens, with those at its beginning and end that the file asks for where `special`."""
        raw = text.encode()
        room = (ctypes.c_int32 * (len(raw) + 8))()
        count = self._library.llama_tokenize(self._vocabulary, raw, len(raw), room, len(room), special, special)
        assert count >= 0
        return list(room[:count])

    def logits(self, ids: Sequence[int]) -> Tensor:
        """After each token, (tokens, vocabulary), float32; at most 512 tokens."""
        library = self._library
        context = library.llama_init_from_model(self._model, library.llama_context_default_params())
        library.llama_set_n_threads(context, THREADS, THREADS)
        if self._lora is not None:
            adapters, scales = (ctypes.c_void_p * 1)(self._lora), (ctypes.c_float * 1)(1.0)
            assert library.llama_set_adapters_lora(context, adapters, 1, scales) == 0
        batch = library.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for k, token in enumerate(ids):
            batch.token[k], batch.pos[k], batch.n_seq_id[k], batch.logits[k] = token, k, 1, 1
            batch.seq_id[k][0] = 0
        assert library.llama_decode(context, batch) == 0
        width = library.llama_vocab_n_tokens(self._vocabulary)
        found = np.ctypeslib.as_array(library.llama_get_logits(context), (len(ids), width)).copy()
        library.llama_batch_free(batch)
        library.llama_free(context)
        return torch.from_numpy(found)
