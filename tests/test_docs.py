"""What the documentation says against what the code does: commands, code, names, formulas, the format."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer.main
import yaml

import losparse_cli
from losparse_cli.budget.plan import Layer, count_nnz, plan_layer
from losparse_cli.budget.recipe import make_recipe
from losparse_cli.checkpoint.codes import fit_contexts
from losparse_cli.checkpoint.config import FusedTensor
from losparse_cli.checkpoint.kept import left_out
from losparse_cli.checkpoint.layers import unpack_layer
from losparse_cli.checkpoint.report import LayerReport, Report
from losparse_cli.cli import app
from losparse_cli.compression.request import Refinement, make_request
from losparse_cli.linalg.patterns import parse_pattern, select
from losparse_cli.shim import kept, streams, tables
from losparse_cli.shim.codec import decode, encode, smallest
from losparse_cli.shim.layouts import (
    FORMAT_VERSION,
    INDEX_TENSORS,
    LayerSpec,
    bound_index_bytes,
    candidates,
    group_rows,
)
from losparse_cli.text.request import Calibration

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "losparse_cli"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGE_NAMES = [page.name for page in PAGES]
COMMAND: Any = typer.main.get_command(app.app)

each_page = pytest.mark.parametrize("page", PAGES, ids=PAGE_NAMES)


def read(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def words(name: str) -> str:
    """The page on one line, so that a sentence is found wherever it is broken."""
    return " ".join(read(name).split())


def blocks(text: str, *languages: str) -> list[str]:
    """Contents of the fenced blocks of these languages."""
    found = re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [content for language, content in found if language in languages]


def spans(text: str) -> list[str]:
    """Inline code, outside fenced blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def public(name: str) -> Any:
    """The public object of that name; a submodule of the same name may stand in its place."""
    value = getattr(losparse_cli, name)
    return getattr(value, name) if isinstance(value, ModuleType) else value


def load_generator() -> Any:
    spec = importlib.util.spec_from_file_location("generate_reference", ROOT / "docs" / "generate_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- the command reference ------------------------------------------------------------------------


def test_reference_is_current() -> None:
    assert load_generator().main(["--check"]) == 0


def test_drift_is_an_error_that_says_what_to_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = load_generator()
    generator.PAGE = tmp_path / "reference.md"
    assert generator.main(["--check"]) == 1
    assert "Run: python docs/generate_reference.py" in capsys.readouterr().err
    assert generator.main([]) == 0
    assert generator.main(["--check"]) == 0


def test_reference_has_every_command_and_option() -> None:
    sections = dict(re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", read("reference.md"), flags=re.MULTILINE | re.DOTALL))
    assert list(sections) == list(COMMAND.commands)
    for name, command in COMMAND.commands.items():
        flags = {flag for p in command.params if p.param_type_name == "option" for flag in (*p.opts, *p.secondary_opts)}
        rows = "".join(line.split("|")[1] for line in sections[name].splitlines() if line.startswith("| `-"))
        assert set(re.findall(r"`(-[\w-]+)", rows)) == flags, name


# --- commands in the text -------------------------------------------------------------------------


def shell_commands(line: str) -> Iterator[list[str]]:
    """The simple commands of a shell line, without redirections."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split, lexer.commenters = True, "#"
    words: list[str] = []
    for word in [*lexer, ";"]:
        if set(word) <= set("|&;"):
            yield words
            words = []
        else:
            words.append(word)


def losparse_lines(text: str) -> Iterator[list[str]]:
    """Arguments of every use of `losparse` in shell blocks."""
    for block in blocks(text, "sh", "bash", "shell", "console"):
        for line in block.replace("\\\n", " ").splitlines():
            for words in shell_commands(line.removeprefix("$ ")):
                if words[:1] and Path(words[0]).name == "losparse":
                    yield words[1:]
                elif words[1:3] == ["-m", "losparse_cli"]:
                    yield words[3:]


def parse(arguments: list[str], *, incomplete: bool = False) -> None:
    """Raises what the real command raises on these arguments; `incomplete` lets required ones be absent."""
    if arguments[0].startswith("-"):
        flags = {flag for p in COMMAND.params for flag in p.opts} | {"--help", "-h"}
        assert set(arguments) <= flags
        return
    command = COMMAND.commands[arguments[0]]
    rest = [word for word in arguments[1:] if word not in ("--help", "-h")]
    if len(rest) < len(arguments) - 1:
        incomplete = True
    try:
        command.make_context(arguments[0], rest)
    except Exception as error:
        if not (incomplete and type(error).__name__ == "MissingParameter"):
            raise


@each_page
def test_commands_parse(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for arguments in losparse_lines(text):
        if arguments:
            parse(arguments)
    for span in spans(text):
        if span.startswith("losparse "):
            parse(shlex.split(span.replace("<", "").replace(">", ""))[1:], incomplete=True)


def test_a_wrong_option_would_be_noticed() -> None:
    lines = list(losparse_lines("```sh\nlosparse compress a --no-such 1 && losparse inspect # why\n```\n"))
    assert lines == [["compress", "a", "--no-such", "1"], ["inspect"]]
    for arguments in lines:
        with pytest.raises(Exception, match=r"(?i)no such option|missing"):
            parse(arguments)


@each_page
def test_make_targets_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    lines = [*spans(text), *"".join(blocks(text, "sh", "bash", "console")).removeprefix("$ ").splitlines()]
    targets = {target for line in lines if line.startswith("make ") for target in line.partition("#")[0].split()[1:]}
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert targets <= known


def test_every_make_target_is_described() -> None:
    """In `make help`, and in the table of docs/contributing.md."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.*)$", makefile, flags=re.MULTILINE)
    assert phony is not None
    described = re.findall(r"^([a-z-]+):[^#\n]*## [A-Z]", makefile, flags=re.MULTILINE)
    assert described == phony[1].split()
    table = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8").partition("\n## Where things are")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `make ")]
    assert sorted(re.findall(r"`make ([a-z-]+)`", " ".join(rows))) == sorted(described)


# --- Python in the text ---------------------------------------------------------------------------


@each_page
def test_python_compiles_and_calls_what_exists(page: Path) -> None:
    for block in blocks(page.read_text(encoding="utf-8"), "python", "py"):
        tree = ast.parse(block, filename=page.name)
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            owner = call.func.value if isinstance(call.func, ast.Attribute) else None
            if isinstance(owner, ast.Name) and owner.id == "losparse_cli" and isinstance(call.func, ast.Attribute):
                check_call(call.func.attr, call)


def check_call(name: str, call: ast.Call) -> None:
    keywords = {k.arg: None for k in call.keywords if k.arg is not None}
    signature = inspect.signature(public(name))
    signature.bind(*call.args, **keywords)
    if name == "compress":  # its other options are those of prepare
        prepare = inspect.signature(importlib.import_module("losparse_cli.compress").prepare)
        assert set(keywords) <= {*signature.parameters, *prepare.parameters}


@each_page
def test_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for dotted in set(re.findall(r"\blosparse_cli\.(\w+)", text)):
        assert dotted in losparse_cli.__all__ or (PACKAGE / f"{dotted}.py").exists() or (PACKAGE / dotted).is_dir()
    for path in {span.rstrip("/") for span in spans(text)}:
        if re.match(r"(losparse_cli|docs|tests|\.ci)/", path):
            assert (ROOT / path).exists(), path


def test_quickstart_lists_every_public_name() -> None:
    listed = re.findall(r"^\| `losparse_cli\.(\w+)", read("quickstart.md"), flags=re.MULTILINE)
    assert sorted(listed) == sorted(losparse_cli.__all__)
    for name in losparse_cli.__all__:
        public(name)


def test_contributing_lists_every_verb_and_noun() -> None:
    listed = set(re.findall(r"^\| `losparse_cli/([\w.]+)/?`", read("contributing.md"), flags=re.MULTILINE))
    verbs = {p.name for p in PACKAGE.glob("*.py")} - {"__init__.py", "__main__.py", "errors.py", "progress.py"}
    assert listed == verbs | {p.parent.name for p in PACKAGE.glob("*/__init__.py")}


# --- the method -----------------------------------------------------------------------------------


def test_recipe_in_quickstart(tmp_path: Path) -> None:
    (example,) = blocks(read("quickstart.md"), "yaml")
    (tmp_path / "recipe.yaml").write_text(example, encoding="utf-8")
    request = make_request(tmp_path / "recipe.yaml", {"iterations": 3})
    assert (request.calibration, request.refinement) == (Calibration("text.txt", 16384), Refinement())
    recipe = request.recipe
    assert recipe.for_layer("model.layers.1.mlp.up_proj").rank == 16
    assert recipe.for_layer("model.layers.0.mlp.up_proj").keep == 0.95


def test_sizes_in_method() -> None:
    layer = Layer("layer", "layer.weight", "layer", (1024, 4096), 2)
    table = re.findall(
        r"^\| `(--.*)` \| ([\d,]+) \| ([\d,]+) \| ([\d.]+) % \| ([\d.]+) % \|$", read("method.md"), re.MULTILINE
    )
    assert len(table) > 5
    for options, rank, nnz, parameters, share in table:
        pairs = re.findall(r"--([\w-]+) (\S+)", options)
        flags = {name.replace("-", "_"): value if name == "pattern" else json.loads(value) for name, value in pairs}
        plan = plan_layer(layer, make_recipe({"values": "float", **flags}).settled())
        assert (f"{plan.rank:,}", f"{plan.nnz:,}") == (rank, nnz), options
        assert f"{plan.parameters / (1024 * 4096):.1%}" == f"{parameters}%", options
        assert f"{plan.expected_bytes / layer.dense_bytes:.1%}" == f"{share}%", options


def test_defaults_in_the_text() -> None:
    from losparse_cli.budget.recipe import (
        CALIBRATED_BITS,
        CALIBRATED_KEEP,
        CALIBRATED_RANK_RATIO,
        DEFAULT_BITS,
        DEFAULT_ITERATIONS,
        DEFAULT_KEEP,
        MANY_ITERATIONS,
        MANY_KEPT,
    )
    from losparse_cli.compression.allocation import COARSE_STEPS
    from losparse_cli.linalg import admm

    budget = f"the budget is `--keep {DEFAULT_KEEP}` without calibration text and `--keep {CALIBRATED_KEEP}` with it"
    assert budget in read("method.md")
    defaults = f"`--keep {DEFAULT_KEEP}` and rank 0 are the defaults; with text, `--keep {CALIBRATED_KEEP}`"
    bits = f"Without text, `--bits {DEFAULT_BITS}` is the default; with it, `--bits {CALIBRATED_BITS}`."
    assert bits in words("quickstart.md")
    assert defaults in words("quickstart.md")
    assert CALIBRATED_RANK_RATIO == 1 / 5
    assert f"κ = {CALIBRATED_RANK_RATIO} under a budget" in words("method.md")
    assert f"The default is {DEFAULT_ITERATIONS['magnitude']} passes without data." in read("method.md")
    many = {"admm": f", and {MANY_ITERATIONS} where {MANY_KEPT} or more is kept"}
    for solver, passes in DEFAULT_ITERATIONS.items():
        row = rf"^\| `{solver}` \|.*\| {passes}{many.get(solver, '')} \|$"
        assert re.search(row, read("method.md"), re.MULTILINE), solver
    assert f"λ = {admm.DAMPING:.0%}".replace("%", " %") in read("method.md")
    assert f"polish, {admm.POLISH_ROUNDS} rounds:        S by {admm.POLISH_STEPS} steps" in read("method.md")
    assert f"ρ = {admm.RHO_START}" in read("method.md")
    assert f"Coarse solves ({COARSE_STEPS} steps)" in read("method.md")


def test_reasons_in_method_are_those_of_the_code() -> None:
    source = "".join(p.read_text(encoding="utf-8") for p in PACKAGE.rglob("*.py"))
    rows = re.search(r"^\| Reason \|.*?\n\n", read("method.md"), flags=re.MULTILINE | re.DOTALL)
    assert rows is not None
    for row in rows[0].splitlines()[2:]:
        for reason in re.findall(r"`([^`]+)`", row.split(" | ")[0]):
            assert all(part.strip() in source for part in reason.split("...")), reason


# --- the format -----------------------------------------------------------------------------------

ALL_EXAMPLES = [yaml.safe_load(block) for block in blocks(read("format.md"), "yaml")]
EXAMPLES = [example for example in ALL_EXAMPLES if "layout" in example]
OF_CODES = [example for example in ALL_EXAMPLES if "codes" in example]


def spec_of(example: dict[str, Any]) -> LayerSpec:
    fields = {"pattern": "unstructured", "rank": 0, "nnz": len(example["entries"]), **example}
    return LayerSpec.from_dict(fields | {"index_bytes": len(example.get("S_gaps", ()))})


def support_of(example: dict[str, Any]) -> torch.Tensor:
    support = torch.zeros(example["shape"], dtype=torch.bool)
    for i, j in example["entries"]:
        support[i, j] = True
    return support


def reader() -> dict[str, Any]:
    """The names that the numpy readers in format.md define."""
    names: dict[str, Any] = {}
    for code in blocks(read("format.md"), "python"):
        exec(compile(code, "format.md", "exec"), names)
    return names


def test_every_layout_has_an_example() -> None:
    assert {example["layout"] for example in EXAMPLES} == set(INDEX_TENSORS) - {"codes"}  # whose are of streams
    assert OF_CODES
    headings = re.findall(r"^### (.*)$", read("format.md"), flags=re.MULTILINE)
    assert set(INDEX_TENSORS) - {"codes"} == {name for heading in headings for name in heading.split(", ")} - {"Sizes"}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: str(example["layout"]))
def test_examples_of_layouts(example: dict[str, Any]) -> None:
    spec, support = spec_of(example), support_of(example)
    written = encode(spec, support)
    assert {name: tensor.tolist() for name, tensor in written.items()} == {
        k: v for k, v in example.items() if k[:2] == "S_"
    }
    assert torch.equal(decode(spec, written), support)
    stored = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in written.items()}
    assert stored.items() <= spec.tensor_shapes(torch.float32).items()
    read_back = reader()["support"](spec.to_dict(), {name: tensor.numpy() for name, tensor in written.items()})
    assert torch.equal(torch.from_numpy(read_back), support)


@pytest.mark.parametrize("layout", [layout for layout in INDEX_TENSORS if layout != "codes"])
def test_reader_agrees_with_the_package(layout: str) -> None:
    names, generator = reader(), torch.Generator().manual_seed(0)
    pattern = {"rows": "rows", "columns": "columns", "n:m": "3:5"}.get(layout, "unstructured")
    for shape, density in (((1, 1), 1.0), ((7, 65), 0.02), ((30, 10), 0.5), ((9, 700), 0.001), ((5, 20), 0.0)):
        A = torch.rand(shape, generator=generator)
        support = density > A
        if pattern == "rows":
            support = (support.any(dim=1, keepdim=True)).expand(shape).contiguous()
        elif pattern == "columns":
            support = (support.any(dim=0, keepdim=True)).expand(shape).contiguous()
        elif pattern == "3:5":
            if shape[1] % 5:
                continue
            best = A.view(-1, 5).topk(3, dim=1).indices
            support = torch.zeros(A.numel() // 5, 5, dtype=torch.bool).scatter(1, best, value=True).view(shape)
        nnz = int(support.sum())
        rows = 4 if layout.startswith("gaps") else 0
        draft = LayerSpec(shape, 1, nnz, pattern, layout, rows)
        index = encode(draft, support)
        spec = dataclasses.replace(draft, index_bytes=index["S_gaps"].numel() if rows else 0)
        tensors = {name: tensor.numpy() for name, tensor in index.items()}
        assert torch.equal(torch.from_numpy(names["support"](spec.to_dict(), tensors)), decode(spec, index))
        U, V, values = torch.rand(shape[0], 1), torch.rand(1, shape[1]), torch.rand(nnz)
        tensors |= {"U": U.numpy(), "V": V.numpy(), "weight": values.numpy()}
        expected = (U @ V).masked_scatter(support, (U @ V)[support] + values)
        torch.testing.assert_close(torch.from_numpy(names["dense"](spec.to_dict(), tensors)), expected)


@pytest.mark.parametrize("example", OF_CODES)
def test_examples_of_codes(example: dict[str, Any]) -> None:
    rows, columns = (torch.tensor(example[name], dtype=torch.uint8) for name in ("rows", "columns"))
    numbers = (example[name] for name in ("lane_rows", "base", "unit", "shape"))
    written = streams.encode(torch.tensor(example["codes"]), streams.Contexts(rows, columns, *numbers))
    assert written.tolist() == example["S_codes"]
    assert reader()["codes"](bytes(example["S_codes"])).tolist() == example["codes"]


def test_reader_of_codes_agrees_with_the_package() -> None:
    names = reader()
    generator = torch.Generator().manual_seed(0)
    for shape, step in (((1, 1), 1.0), ((7, 65), 0.3), ((70, 9), 2.0), ((3, 50), 0.001), ((5, 20), 1e9)):
        codes = (torch.randn(shape, generator=generator) / step).round().int()
        for contexts in (
            fit_contexts(codes),
            streams.Contexts(*(torch.zeros(x, dtype=torch.uint8) for x in shape), 3, 1, 1, 9),
        ):
            stream = streams.encode(codes, contexts)
            assert names["codes"](bytes(stream.tolist())).tolist() == codes.tolist()
            m, n = shape
            spec = LayerSpec(shape, 1, int((codes != 0).sum()), "unstructured", "codes", index_bytes=stream.numel())
            scale = torch.randint(90, 170, (n,), generator=generator, dtype=torch.uint8)
            U, V, a = torch.rand(m, 1), torch.rand(1, n), torch.rand(m)
            tensors_of = {"U": U, "V": V, "weight": a, "S_codes": stream, "S_scale": scale}
            for run in (0, n) if int(codes.abs().max()) < 128 else (0,):
                spec = dataclasses.replace(spec, run=run)
                tensors_of |= {"S_runs": torch.randint(1, 16, (m, 1), generator=generator).char()} if run else {}
                read = names["dense"](spec.to_dict(), {name: tensor.numpy() for name, tensor in tensors_of.items()})
                torch.testing.assert_close(torch.from_numpy(read), unpack_layer(spec, tensors_of).dense())
    for shape, pattern in (((6, 12), "2:4"), ((3, 32), "8:16"), ((11, 9), "rows"), ((11, 9), "columns")):
        codes = (torch.randn(shape, generator=generator) * 5).round().int()
        codes *= select(codes.float(), parse_pattern(pattern), count_nnz(shape, 0.5, pattern, "matrix"))
        how = left_out(codes, pattern)
        assert how is not None
        stream = kept.encode(codes, how[0])
        assert int(stream[0]) == kept.FORMAT
        assert names["codes"](bytes(stream.tolist())).tolist() == codes.tolist()
    line = torch.tensor([[0, 0, 4, 0, 9], [4, 0, -4, 0, 0]])
    some = streams.Contexts(
        torch.tensor([0, 1]).byte(), torch.zeros(5).byte(), 1, tables=((4000,), (9, *[0] * 3, 4000, *[0] * 3, 9))
    )
    assert names["codes"](bytes(streams.encode(line, some).tolist())).tolist() == line.tolist()
    for scale in (*range(-52, 84, 45), 80):
        for kind in range(len(tables.SHAPES)):
            assert tuple(names["frequencies"](scale, kind)) == tables.table(tables.within(scale), kind)


def test_sizes_in_format() -> None:
    for (m, n), k in (((100, 70), 900), ((3, 70000), 5000)):
        c = 2 if n <= 65536 else 4
        assert bound_index_bytes("bitmask", "unstructured", (m, n), k) == m * -(-n // 8)
        assert bound_index_bytes("csr", "unstructured", (m, n), k) == c * k + 4 * (m + 1)
        R = group_rows(n)
        assert max(4, -(-8192 // n)) == R
        gaps = LayerSpec((m, n), 0, k, "unstructured", "gaps4", R, 1234)
        assert gaps.nbytes(torch.bfloat16) == 2 * k + 1234 + 8 * (-(-m // R) + 1)
    assert bound_index_bytes("rows", "rows", (100, 70), 700) == 4 * 700 // 70
    assert bound_index_bytes("columns", "columns", (100, 70), 700) == 4 * 700 // 100
    assert bound_index_bytes("n:m", "3:5", (100, 70), 4200) == -(-4200 * 3 // 8)
    assert LayerSpec((100, 70), 8, 0, "unstructured", "rows").nbytes(torch.float32) == 4 * 8 * 170
    assert candidates("unstructured", (100, 70), 0) == ("rows",)
    assert smallest(torch.zeros(3, 4, dtype=torch.bool), 0, "2:4")[0].layout == "rows"


def test_config_block() -> None:
    text, fused = blocks(read("format.md"), "json")
    block = json.loads(text)
    assert block["format_version"] == 1
    assert f"Format versions 1 to {FORMAT_VERSION}:" in read("format.md")
    for fields in block["modules"].values():
        assert LayerSpec.from_dict(fields).to_dict() == fields
        if "group_rows" in fields:
            assert fields["group_rows"] == group_rows(fields["shape"][1])
    (one,) = (FusedTensor(**fields) for fields in json.loads(fused).values())
    assert one.parts[31] == "model.layers.0.mlp.experts.31.gate_up_proj.weight"


def test_every_field_is_documented() -> None:
    known = set(spans(read("format.md")))
    for kind in (LayerSpec, Report, LayerReport):
        assert {field.name for field in dataclasses.fields(kind)} - {"spec"} <= known  # whose own are


# --- the rest -------------------------------------------------------------------------------------


def test_benchmarks_in_the_documentation_exist() -> None:
    source = (ROOT / "tests" / "benchmarks" / "__main__.py").read_text(encoding="utf-8")
    known = set(re.findall(r'^    "([\w-]+)":', source, flags=re.MULTILINE))
    named = re.findall(r"-m tests\.benchmarks ([\w -]+)`", read("performance.md") + read("serving.md"))
    assert {name for line in named for name in line.split()} == known


def test_changelog_has_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{losparse_cli.__version__}]" in changelog or "## [Unreleased]" in changelog


@each_page
def test_relative_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=[*PAGE_NAMES, "CHANGELOG.md"])
def test_no_path_of_a_machine(page: Path) -> None:
    assert not re.search(r"(?<![\w.])/(work|tmp|home|root|Users)/", page.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_site_builds_strictly(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "mkdocs",
            "build",
            "--strict",
            "-q",
            "-f",
            str(ROOT / ".mkdocs.yml"),
            "-d",
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
