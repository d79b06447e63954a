"""CodedEmbedding, and what is tied to one: rows looked up from whole numbers, and stored again as they were."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
import transformers
from conftest import answer, token_batch, toy_model
from torch import Tensor, nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from losparse_cli.checkpoint.codes import fit_contexts
from losparse_cli.shim.embedding import CodedEmbedding, own_kind
from losparse_cli.shim.layouts import LayerSpec, column_factors
from losparse_cli.shim.linear import LowRankSparseLinear
from losparse_cli.shim.quantizer import install_layers
from losparse_cli.shim.streams import encode

ROWS, WIDTH = 40, 12


def stored(dtype: torch.dtype, wide: bool = False) -> tuple[LayerSpec, dict[str, Tensor]]:
    """The entry and the tensors of an embedding; wide: some codes need two bytes."""
    chance = torch.Generator().manual_seed(0)
    codes = torch.randint(-900 if wide else -90, 901 if wide else 91, (ROWS, WIDTH), generator=chance)
    stream = encode(codes, fit_contexts(codes))
    nnz = int(torch.count_nonzero(codes))
    spec = LayerSpec((ROWS, WIDTH), 0, nnz, "unstructured", "codes", index_bytes=stream.numel(), kind="embedding")
    factors = torch.rand(ROWS, generator=chance).to(dtype) / 16
    scale = torch.randint(120, 136, (WIDTH,), generator=chance, dtype=torch.uint8)
    return spec, {"weight": factors, "S_codes": stream, "S_scale": scale}


def coded(dense: nn.Embedding, wide: bool = False) -> CodedEmbedding:
    spec, tensors = stored(dense.weight.dtype, wide)
    made = CodedEmbedding.replacing(dense, spec)
    made.load_state_dict(tensors, strict=False)
    return made


def embedding(**options: Any) -> nn.Embedding:
    return nn.Embedding(ROWS, WIDTH, **options)


IDS = torch.tensor([[0, 3, 39], [7, 7, 1]])


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rows_are_those_of_the_dense_matrix(dtype: torch.dtype, wide: bool) -> None:
    made = coded(embedding(dtype=dtype), wide)
    W = made.dense().to(dtype)
    assert torch.equal(made(IDS), nn.functional.embedding(IDS, W))
    assert made(IDS).dtype == dtype
    assert made._index is not None
    assert made._index.dtype == (torch.int16 if wide else torch.int8)
    assert made(IDS[:, :0]).shape == (2, 0, WIDTH)
    assert isinstance(made, nn.Embedding)
    for wrong in (ROWS, -1):
        with pytest.raises(IndexError):
            made(torch.tensor([wrong]))


@pytest.mark.parametrize(
    "dense",
    [
        Gemma3TextScaledWordEmbedding(ROWS, WIDTH, 0, embed_scale=math.sqrt(WIDTH)),
        BartScaledWordEmbedding(ROWS, WIDTH, 1, embed_scale=3.7),
    ],
    ids=["gemma3", "bart"],
)
def test_a_class_that_scales_its_rows_goes_on_to(dense: Any) -> None:
    made = coded(dense)
    with torch.no_grad():
        dense.weight.copy_(made.dense())
    assert torch.equal(made(IDS), dense(IDS))
    assert isinstance(made, type(dense))
    assert own_kind(type(made)) is type(dense)
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert type(twin) is type(made)
        assert torch.equal(twin(IDS), dense(IDS))
    torch.testing.assert_close(made.bfloat16()(IDS).float(), dense(IDS), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("settled", [False, True])
def test_what_is_stored_again_is_what_was_read(settled: bool) -> None:
    spec, tensors = stored(torch.bfloat16)
    made = CodedEmbedding.replacing(embedding(dtype=torch.bfloat16), spec)
    made.load_state_dict(tensors)
    if settled:
        made.settle()
        assert not [name for name, _ in made.named_buffers() if name.startswith("S_")]
    again = made.state_dict()
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    made.load_state_dict(again)
    assert torch.equal(made(IDS), made.dense().bfloat16()[IDS])


def test_another_dtype_changes_factors_alone() -> None:
    made = coded(embedding())
    before = made(IDS)
    half = copy.deepcopy(made).to(torch.bfloat16)
    assert half(IDS).dtype == torch.bfloat16
    torch.testing.assert_close(half(IDS).float(), before, rtol=1e-2, atol=1e-2)
    assert torch.equal(half.state_dict()["S_codes"], made.state_dict()["S_codes"])
    assert made.to("meta")(IDS.to("meta")).shape == (2, 3, WIDTH)


def test_factors_have_gradients_and_padding_none() -> None:
    made = coded(embedding(padding_idx=7))
    dense = made.dense().requires_grad_()
    made(IDS).square().sum().backward()
    nn.functional.embedding(IDS, dense, padding_idx=7).square().sum().backward()
    assert dense.grad is not None
    assert made.weight.grad is not None
    unit = made.dense() / made.weight.detach()[:, None]
    torch.testing.assert_close(made.weight.grad, (dense.grad * unit).sum(1))
    assert made.weight.grad[7] == 0


def test_a_damaged_stream_is_refused() -> None:
    spec, tensors = stored(torch.float32)
    made = CodedEmbedding.replacing(embedding(), spec)
    tensors["S_codes"][60] ^= 1
    made.load_state_dict(tensors)
    with pytest.raises(ValueError, match="checksum"):
        made.settle()


def test_an_entry_of_an_embedding_holds_codes_alone() -> None:
    fields = stored(torch.float32)[0].to_dict()
    assert fields["kind"] == "embedding"
    assert LayerSpec.from_dict(fields).to_dict() == fields
    for change in ({"rank": 1}, {"layout": "bitmask"}, {"transposed": True}):
        with pytest.raises(ValueError, match="impossible"):
            LayerSpec.from_dict(fields | change)
    with pytest.raises(ValueError, match="unknown kind"):
        LayerSpec.from_dict(fields | {"kind": "table"})
    assert "kind" not in LayerSpec((4, 4), 0, 0, "unstructured", "rows").to_dict()


# --- in a model -----------------------------------------------------------------------------------


def installed(name: str, **changes: Any) -> Any:
    """A toy of ROWS tokens whose embeddings are codes, with their weights in place."""
    model = toy_model(name, vocab_size=ROWS, **changes)
    embeddings = model.get_input_embeddings()
    place = next(n for n, module in model.named_modules() if module is embeddings)
    width = embeddings.embedding_dim
    codes = torch.randint(-99, 100, (ROWS, width), generator=torch.Generator().manual_seed(1))
    stream = encode(codes, fit_contexts(codes))
    nnz = int(torch.count_nonzero(codes))
    spec = LayerSpec((ROWS, width), 0, nnz, "unstructured", "codes", index_bytes=stream.numel(), kind="embedding")
    assert install_layers(model, {place: spec}) == {place: place}
    tensors = {"weight": torch.full((ROWS,), 0.001), "S_codes": stream, "S_scale": torch.full((width,), 128)}
    model.get_submodule(place).load_state_dict(tensors)
    return model.eval()


TIED = ["gpt2", "qwen2", "gemma3", "t5", "bart", "opt", "falcon", "mamba"]


def batch(model: Any) -> dict[str, Tensor]:
    return {k: v % ROWS if "ids" in k else v for k, v in token_batch(model).items()}


@torch.no_grad()
def said(model: Any) -> Tensor:
    return model(**batch(model)).logits


@pytest.mark.parametrize("name", TIED)
def test_what_is_tied_computes_with_the_same_codes(name: str) -> None:
    model = installed(name)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert type(head) is LowRankSparseLinear
    assert head.weight is embeddings.weight
    assert torch.equal(head.dense(), embeddings.dense())
    assert not [key for key in head.state_dict() if key.startswith("S_")]
    dense = toy_model(name, vocab_size=ROWS)
    with torch.no_grad():
        dense.get_input_embeddings().weight.copy_(embeddings.dense())
        dense.tie_weights()
    torch.testing.assert_close(said(model), said(dense), rtol=1e-4, atol=1e-5)
    assert float(column_factors(torch.tensor([128]))) == 1  # what `installed` says of the columns


@pytest.mark.parametrize("name", ["qwen2", "gemma3", "t5"])
def test_copies_have_codes_of_their_own(name: str) -> None:
    model = installed(name)
    before = said(model)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for twin in (copy.deepcopy(model), torch.load(saved, weights_only=False)):
        assert torch.equal(said(twin), before)
        head, embeddings = twin.get_output_embeddings(), twin.get_input_embeddings()
        assert head._owner == (embeddings,)
        assert head._owner != model.get_output_embeddings()._owner
        twin.tie_weights()
        assert head.weight is embeddings.weight
        assert torch.equal(said(twin.to(torch.float64)).float(), said(twin).float())
    assert torch.equal(said(model), before)


def test_an_embedding_of_another_class_is_refused() -> None:
    model = toy_model("llama", vocab_size=ROWS)
    spec = stored(torch.float32)[0]
    entry = LayerSpec((ROWS, 68), 0, 0, "unstructured", "codes", index_bytes=spec.index_bytes, kind="embedding")
    with pytest.raises(ValueError, match="lm_head is a Linear in LlamaForCausalLM"):
        install_layers(model, {"lm_head": entry})


def test_answers_are_those_of_tokens(compressed: Any) -> None:
    """The toys of the other tests stay as they were: their vocabularies are too small to be coded."""
    model = transformers.AutoModelForCausalLM.from_pretrained(compressed("llama", bits=5.0))
    assert not [module for module in model.modules() if isinstance(module, CodedEmbedding)]
    assert torch.isfinite(answer(model)).all()
