"""Embeddings in whole numbers: what coding them takes."""

from __future__ import annotations

import json
import subprocess
import sys

PEAK = """
import json, torch
from losparse_cli.budget.plan import Layer, make_plan
from losparse_cli.budget.recipe import Recipe
from losparse_cli.compression import rows

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

def coded(m, n):
    weight = torch.randn(m, n).bfloat16()
    layer = Layer("embed", "embed.weight", "embed", (m, n), 2, rows="embedding")
    [plan] = make_plan([layer], {}, Recipe(bits=4)).layers
    rows.code_rows(plan, weight, torch.device("cpu"))
    return plan

coded(9000, 512)  # what a process takes once, and blocks of rows in floats
before = peak()
plan = coded(50000, 512)
print(json.dumps([peak() - before, plan.layer.weights]))
"""


def test_rows_take_the_memory_that_is_foreseen() -> None:
    """Some 15 bytes a weight; 16 are foreseen, and the first matrix has taken some of them already."""
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    taken, weights = json.loads(done.stdout)
    assert 4 * weights < taken < 20 * weights
