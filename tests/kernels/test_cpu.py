"""Every way to the product against float64: each form, dtype, shape and instruction set, and what surrounds them."""

from __future__ import annotations

import copy
import itertools
import logging
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import toy_model
from products import TOLERANCE, needs_compiler
from torch import Tensor

from losparse_cli import compress, kernels, verify
from losparse_cli.errors import UsageError
from losparse_cli.kernels import choice, native
from losparse_cli.kernels.dispatch import Kernels
from losparse_cli.shim import installed, operator
from losparse_cli.shim.codec import encode, smallest
from losparse_cli.shim.layouts import LayerSpec, group_rows
from losparse_cli.shim.linear import LowRankSparseLinear

pytestmark = pytest.mark.usefixtures("installed_kernels")


def layer_of(
    shape: tuple[int, int], density: float, *, rank: int = 3, bias: bool = True, dtype: torch.dtype = torch.float32,
    pattern: str = "unstructured", form: str | None = None, layout: str | None = None, seed: int = 0,
) -> LowRankSparseLinear:  # fmt: skip
    """A layer with random entries; form: what it computes with, whatever is smaller."""
    m, n = shape
    generator = torch.Generator().manual_seed(seed)
    if pattern == "rows":
        support = (torch.rand(m, 1, generator=generator) < density).expand(m, n).contiguous()
    elif pattern == "columns":
        support = (torch.rand(1, n, generator=generator) < density).expand(m, n).contiguous()
    elif ":" in pattern:
        keep, group = map(int, pattern.split(":"))
        order = torch.rand(m, n // group, group, generator=generator).argsort(-1)
        support = (order < keep).view(m, n)
    else:
        support = torch.rand(m, n, generator=generator) < density
    rank = min(rank, m, n)
    if form == "gaps" and support.any():
        layout = "gaps8"  # a bitmask is never computed with as gaps
    if layout is None:
        spec, index = smallest(support, rank, pattern)
    else:
        rows = group_rows(n) if layout.startswith("gaps") else 0
        spec = LayerSpec((m, n), rank, int(support.sum()), pattern, layout, rows)
        index = encode(spec, support)
        if "S_gaps" in index:
            spec = LayerSpec((m, n), rank, spec.nnz, pattern, layout, rows, index["S_gaps"].numel())
    layer = LowRankSparseLinear(spec, bias=bias, dtype=dtype)
    if layer.form in ("bits", "gaps"):  # an empty S has no other form than its own
        layer._form = form or layer.form
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
        for name, tensor in index.items():
            getattr(layer, name).copy_(tensor)
    return layer


def exact(layer: LowRankSparseLinear, x: Tensor) -> Tensor:
    """The product in float64, from the parts."""
    S = torch.zeros(layer.spec.shape, dtype=torch.float64).masked_scatter(layer.support(), layer.weight.double())
    y = F.linear(x.double(), S)
    if layer.U is not None and layer.V is not None:
        y = y + F.linear(F.linear(x.double(), layer.V.double()), layer.U.double())
    return (y if layer.bias is None else y + layer.bias.double()).detach()


def assert_close(y: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert y.dtype == dtype
    assert y.shape == expected.shape
    # Of a handful of numbers that are sums of order 1, all may be small by chance.
    norm = expected.norm().clamp_min(1e-6 if y.numel() > 8 else 1.0)
    assert float((y.double() - expected).norm() / norm) < TOLERANCE[dtype]


# --- every way --------------------------------------------------------------------------------------

SIZES = [(1, 1), (7, 13), (13, 7), (1, 576), (576, 13), (130, 1537), (4097, 7)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("form", ["bits", "gaps"])
@pytest.mark.parametrize("way", ["spread", "gather", "walk", "tile", None])
def test_every_way_is_the_product(
    way: str | None, form: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way:
        monkeypatch.setenv("LOSPARSE_KERNEL", way)
    kernels.install()
    for k, (shape, density) in enumerate(itertools.product(SIZES, (0.0, 0.004, 0.1, 0.5, 1.0))):
        layer = layer_of(shape, density, rank=k % 3 * 4, bias=k % 2 == 0, dtype=dtype, form=form, seed=k)
        for rows in (1, 2, 5, 16, 17, 70):
            x = torch.randn(rows, shape[1]).to(dtype)
            with torch.no_grad():
                assert_close(layer(x), exact(layer, x), dtype)


@pytest.mark.usefixtures("instructions")
def test_every_instruction_set_is_the_product() -> None:
    for dtype, form, rows in itertools.product((torch.bfloat16, torch.float32), ("bits", "gaps"), (1, 4, 16, 33)):
        for density in (0.05, 0.3):
            layer = layer_of((70, 333), density, dtype=dtype, form=form)
            x = torch.randn(rows, 333).to(dtype)
            with torch.no_grad():
                assert_close(layer(x), exact(layer, x), dtype)


@pytest.mark.usefixtures("instructions")
def test_every_instruction_set_is_the_product_where_s_is_structured() -> None:
    for dtype, pattern, rows in itertools.product((torch.bfloat16, torch.float32), ("rows", "columns", "2:4"), (1, 17)):
        layer = layer_of((48, 132), 0.3, rank=8, bias=True, dtype=dtype, pattern=pattern)
        x = torch.randn(rows, 132).to(dtype)
        with torch.no_grad():
            assert_close(layer(x), exact(layer, x), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("pattern", ["rows", "columns", "2:4", "1:4"])
@pytest.mark.parametrize("bias", [True, False])
def test_structured_patterns(pattern: str, bias: bool, dtype: torch.dtype) -> None:
    for rank, density, rows in itertools.product((0, 8), (0.0, 0.1, 1.0), (1, 16, 70)):
        layer = layer_of((48, 132), density, rank=rank, bias=bias, dtype=dtype, pattern=pattern)
        x = torch.randn(rows, 132).to(dtype)
        with torch.no_grad():
            assert_close(layer(x), exact(layer, x), dtype)


@pytest.mark.parametrize("pattern", ["unstructured", "rows", "columns", "2:4"])
def test_x_of_any_strides_and_dimensions(pattern: str) -> None:
    layer = layer_of((40, 64), 0.3, pattern=pattern)
    whole = torch.randn(64, 5, 3, 2)
    with torch.no_grad():
        for x in (
            whole.permute(3, 1, 2, 0), whole[:, 0].permute(1, 2, 0), whole[:, 0, 0].T, whole[:, 0, 0, 0],
            torch.randn(3, 128)[:, ::2], torch.randn(0, 64), torch.randn(2, 0, 64),
        ):  # fmt: skip
            assert_close(layer(x), exact(layer, x), torch.float32)


def test_the_kernels_are_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A way that answers None everywhere would pass all tests above."""
    if native.library() is None:
        pytest.skip("needs a C compiler")
    for way, rows, form in (("spread", 16, "bits"), ("gather", 1, "gaps"), ("walk", 40, "bits"), ("tile", 40, "gaps")):
        monkeypatch.setenv("LOSPARSE_KERNEL", way)
        layer = layer_of((64, 96), 0.2, form=form)
        if way == "spread" and native.library().level < native.LEVELS.index("AVX-512"):  # type: ignore[union-attr]
            continue
        index, starts = layer._index_and_starts()
        y = Kernels().product(
            torch.randn(rows, 96), layer.weight, index, starts, layer.U, layer.V, layer.bias, 64, form
        )
        assert y is not None, way


@pytest.mark.parametrize("pattern", ["unstructured", "rows", "columns"])
def test_sizes_that_do_not_belong_together_never_reach_the_kernels(pattern: str) -> None:
    layer = layer_of((40, 64), 0.3, pattern=pattern)
    with pytest.raises(RuntimeError, match="65 features, and this layer takes 64"):
        layer(torch.randn(2, 65))
    index, starts = layer._index_and_starts()
    x, whole = torch.randn(2, 64), (layer.weight, index, starts, layer.U, layer.V, layer.bias)
    assert Kernels().described(*whole, (40, 64), layer.form) is not None or native.library() is None
    assert Kernels().described(*whole, (40, 80), layer.form) is None
    assert Kernels().described(*whole, (48, 64), layer.form) is None
    for k, wrong in ((3, torch.zeros(40, 2)), (4, torch.zeros(3, 60)), (5, torch.zeros(39)), (0, layer.weight.half())):
        changed = [*whole[:k], wrong, *whole[k + 1 :]]
        assert Kernels().described(*changed, (40, 64), layer.form) is None
    away = copy.deepcopy(layer).to("meta")
    with torch.no_grad():
        y = operator.product(x, away.weight, index, starts, layer.U, layer.V, layer.bias, 40, layer.form)
    assert y.is_meta  # no numbers without weights


def test_chooses_by_rows_and_density() -> None:
    def way(form: str, rows: int, density: float, **changed: bool) -> str | None:
        return choice.cpu_way(form, rows, 4096, density, **{"native": True, "half": True, "spreads": True} | changed)

    assert way("columns", 1, 0.1) == way("rows", 500, 0.1, native=False) == "block"
    assert way("bits", 1, 0.1) == way("bits", 16, 0.5) == "spread"
    assert way("gaps", 1, 0.02) == way("bits", 1, 0.1, spreads=False) == "gather"
    assert way("bits", 256, 0.05) == "walk"
    assert way("bits", 256, 0.5) == "tile"


# --- a layer in use ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["bitmask", "csr", "gaps4", "gaps8"])
@pytest.mark.parametrize("shape", [(9, 40), (64, 160), (33, 1000)])
def test_the_index_is_the_one_that_the_reference_makes(layout: str, shape: tuple[int, int]) -> None:
    for density in (0.01, 0.1, 0.6):
        fast = layer_of(shape, density, layout=layout, dtype=torch.bfloat16, form="bits")
        plain = copy.deepcopy(fast)
        installed.install(None)
        expected = plain._made()
        kernels.install()
        assert all(torch.equal(a, b) for a, b in zip(fast._made(), expected, strict=True))  # type: ignore[arg-type]
        assert fast.state_dict().keys() == plain.state_dict().keys()
        fast.settle()
        for name, tensor in plain.state_dict().items():
            assert torch.equal(fast.state_dict()[name], tensor), name


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "rows", "columns"])
@pytest.mark.parametrize("density", [0.02, 0.05, 0.1, 0.5])
def test_in_memory_at_most_1_3_times_the_stored_bytes(pattern: str, density: float) -> None:
    layer = layer_of((512, 1024), density, rank=8, dtype=torch.bfloat16, pattern=pattern)
    layer.settle()
    held = sum(t.numel() * t.element_size() for t in (*layer.parameters(), *layer.buffers()))
    assert held <= 1.3 * (layer.spec.nbytes(torch.bfloat16) + 2 * 512)


def test_gradients_are_those_of_the_dense_product() -> None:
    for pattern, density in (("unstructured", 0.3), ("unstructured", 0.02), ("rows", 0.4), ("columns", 0.4)):
        for rank, bias in ((3, True), (0, False)):
            layer = layer_of((12, 20), density, rank=rank, bias=bias, dtype=torch.float64, pattern=pattern)
            index, starts = layer._index_and_starts()
            x = torch.randn(2, 3, 20, dtype=torch.float64, requires_grad=True)
            parts = [x, *(p for p in (layer.weight, layer.U, layer.V, layer.bias) if p is not None)]

            def through(*given: Tensor, index: Any = index, starts: Any = starts, layer: Any = layer) -> Tensor:
                x, values, *rest = given
                U, V = (rest[0], rest[1]) if layer.U is not None else (None, None)
                b = rest[-1] if layer.bias is not None else None
                return operator.product(x, values, index, starts, U, V, b, 12, layer.form)

            assert torch.autograd.gradcheck(through, parts)


def test_gradients_through_kernels() -> None:
    layer = layer_of((40, 72), 0.2)
    plain = copy.deepcopy(layer)
    x = torch.randn(7, 72)
    layer(x).square().sum().backward()
    installed.install(None)
    plain(x).square().sum().backward()
    for (name, ours), (_, other) in zip(layer.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(ours.grad, other.grad, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("pattern", ["unstructured", "columns"])
def test_torch_accepts_the_operator(pattern: str) -> None:
    layer = layer_of((12, 24), 0.4, pattern=pattern)
    index, starts = layer._index_and_starts()
    given = (
        torch.randn(3, 24, requires_grad=True), layer.weight, index, starts, layer.U, layer.V, layer.bias, 12,
        layer.form,
    )  # fmt: skip
    torch.library.opcheck(operator._linear, given)


def test_compile_and_export_see_through_it() -> None:
    model = torch.nn.Sequential(layer_of((24, 40), 0.3), torch.nn.GELU(), layer_of((8, 24), 0.3, pattern="columns"))
    x = torch.randn(5, 40)
    with torch.no_grad():
        expected = model(x)  # which also settles the layers
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected)
        exported = torch.export.export(model, (x,))
        torch.testing.assert_close(exported.module()(x), expected)
    names = {str(node.target) for node in exported.graph.nodes}
    assert any("losparse.linear" in name for name in names), names
    trained = torch.compile(copy.deepcopy(model), backend="aot_eager")
    trained(x).sum().backward()
    assert all(p.grad is not None for p in trained.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_it_does_for_linear(dtype: torch.dtype) -> None:
    layer = layer_of((24, 40), 0.3)
    x = torch.randn(5, 40)
    with torch.autocast("cpu", dtype=dtype):
        assert layer(x).dtype == dtype == F.linear(x, torch.randn(3, 40)).dtype


# --- where it cannot be had -------------------------------------------------------------------------


def test_without_a_compiler_one_line_is_logged_and_all_works(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("LOSPARSE_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    native.library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, logger="losparse"):
            layer = layer_of((24, 40), 0.3)
            x = torch.randn(5, 40)
            for _ in range(3):
                with torch.no_grad():
                    assert_close(layer(x), exact(layer, x), torch.float32)
        (said,) = (r.getMessage() for r in caplog.records if "compile" in r.getMessage())
        assert said.endswith("sparse.c was not compiled: no C compiler found (cc, gcc or clang, or one named by CC)")
    finally:
        native.library.cache_clear()


@needs_compiler
def test_a_compiler_that_fails_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho 'cc: internal error' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("LOSPARSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CC", str(broken))
    native.library.cache_clear()
    try:
        assert native.library() is None
        assert "cc: internal error" in caplog.text
        assert list((tmp_path / "cache" / "kernels").iterdir()) == []
    finally:
        native.library.cache_clear()


@needs_compiler
def test_compiled_once_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LOSPARSE_CACHE", str(tmp_path))
    monkeypatch.setattr(native, "FLAGS", ("-O0", *native.FLAGS[1:]))  # in a tenth of the time
    assert not native.is_ready()
    first = native._compiled()
    assert native.is_ready()
    made = first.stat().st_mtime_ns
    assert native._compiled() == first
    assert first.stat().st_mtime_ns == made
    assert [p.name for p in (tmp_path / "kernels").iterdir()] == [first.name]


@needs_compiler
def test_a_compiler_without_torchs_openmp(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    poor, (usual, *_) = tmp_path / "cc", native._compiler()
    poor.write_text(f'#!/bin/sh\ncase "$*" in *openmp*) exit 1;; esac\nexec {usual} "$@"\n')
    poor.chmod(0o755)
    monkeypatch.setenv("LOSPARSE_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", str(poor))
    monkeypatch.setattr(native, "FLAGS", ("-O0", *native.FLAGS[1:]))
    native.library.cache_clear()
    try:
        assert native.library() is not None
        assert "run on one thread" in caplog.text
        layer, x = layer_of((24, 40), 0.3), torch.randn(5, 40)
        with torch.no_grad():
            assert_close(layer(x), exact(layer, x), torch.float32)
    finally:
        native.library.cache_clear()


def test_an_unknown_kernel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOSPARSE_KERNEL", "magic")
    with pytest.raises(UsageError, match=r"LOSPARSE_KERNEL=magic .* reference, spread"):
        kernels.install()
    monkeypatch.setenv("LOSPARSE_KERNEL", "reference")
    kernels.install()
    assert not isinstance(installed.kernels(), Kernels)


@pytest.mark.slow
@needs_compiler
def test_no_access_outside_buffers(tmp_path: Path) -> None:
    source, program = Path(__file__).with_name("sanitize.c"), tmp_path / "sanitize"
    flags = ["-O0", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fopenmp", "-std=gnu11"]
    compiler = native._compiler()
    empty = tmp_path / "empty.c"
    empty.write_text("int main(void) { return 0; }", encoding="utf-8")
    if subprocess.run([*compiler, *flags, str(empty), "-o", str(program)], capture_output=True).returncode:
        pytest.skip("the compiler has no sanitizers here")
    subprocess.run([*compiler, *flags, "-Wno-psabi", str(source), "-lm", "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
    assert done.stdout.startswith("checked ")


# --- what is looked up beforehand -------------------------------------------------------------------


def prepared(layer: LowRankSparseLinear) -> bool:
    return layer._ready is not None and layer._ready[1] is not None


@needs_compiler
@pytest.mark.parametrize("pattern", ["unstructured", "rows", "columns"])
@pytest.mark.parametrize("shape", [(1,), (1, 1), (3, 2), (16,), (17,)])
def test_a_product_looked_up_is_the_same(pattern: str, shape: tuple[int, ...]) -> None:
    layer = layer_of((48, 80), 0.2, pattern=pattern)
    x = torch.randn(*shape, 80)
    with torch.no_grad():
        layer(x)
        found = layer(x)
        call = layer._ready[1]
        alone = None if call is None else call(x, layer._parameters)
    assert found.shape == (*shape, 48)
    torch.testing.assert_close(found, F.linear(x, layer.dense(), layer.bias), rtol=1e-5, atol=1e-5)
    if native.library().level >= 2:  # type: ignore[union-attr] # AVX-512: few rows are one call
        few = x.numel() // 80 <= (6 if pattern == "unstructured" else 16)
        assert (alone is not None) == few


@needs_compiler
def test_what_was_looked_up_is_not_used_for_another_layer() -> None:
    layer, x = layer_of((40, 64), 0.2), torch.randn(1, 64)
    if native.library().level < 2:  # type: ignore[union-attr]
        pytest.skip("needs AVX-512")
    layer.settle()
    with torch.no_grad():
        layer(x)
        assert prepared(layer)
        twin = copy.deepcopy(layer)
        assert twin._ready is None
        layer.weight.data = 2 * layer.weight.data  # elsewhere in memory
        torch.testing.assert_close(layer(x), F.linear(x, layer.dense(), layer.bias), rtol=1e-5, atol=1e-5)
        layer.weight.mul_(0.5)  # where it was
        torch.testing.assert_close(layer(x), twin(x), rtol=1e-5, atol=1e-5)
        state = twin.state_dict()
        state["weight"] = 3 * state["weight"]
        layer.load_state_dict(state)
        torch.testing.assert_close(layer(x), F.linear(x, layer.dense(), layer.bias), rtol=1e-5, atol=1e-5)
        half = layer.to(torch.bfloat16)
        assert half(x.bfloat16()).dtype == torch.bfloat16
        expected = F.linear(x.bfloat16().float(), half.dense(), half.bias.float())  # type: ignore[union-attr]
        torch.testing.assert_close(half(x.bfloat16()).float(), expected, rtol=3e-2, atol=3e-2)


@needs_compiler
def test_gradients_autocast_and_tracing_go_the_long_way() -> None:
    layer, x = layer_of((40, 64), 0.2), torch.randn(1, 64)
    layer.settle()
    with torch.no_grad():
        layer(x)
    y = layer(x)
    assert y.requires_grad
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    with torch.no_grad():
        traced = torch.jit.trace(layer, (x,), check_trace=False)
        z = torch.randn(1, 64)
        torch.testing.assert_close(traced(z), layer(z), rtol=1e-5, atol=1e-5)
        with pytest.raises(RuntimeError, match="63 features"):
            layer(torch.randn(1, 63))
        torch.testing.assert_close(layer(x.expand(2, 64)), layer(x.repeat(2, 1)), rtol=1e-5, atol=1e-5)
        installed.install(None)
        torch.testing.assert_close(layer(x), F.linear(x, layer.dense(), layer.bias), rtol=1e-5, atol=1e-5)
        assert not prepared(layer)


def test_layers_are_written_and_read_with_the_kernels_whoever_asks(tmp_path: Path) -> None:
    installed.install(None)
    model = toy_model("llama")
    model.save_pretrained(tmp_path / "dense")
    compress(tmp_path / "dense", tmp_path / "out", {"rank": 2, "sparsity": 0.5})
    assert isinstance(installed.kernels(), Kernels)
    installed.install(None)
    assert not verify(tmp_path / "out").problems
    assert isinstance(installed.kernels(), Kernels)
