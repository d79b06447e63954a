"""A whole run on a generated 2-billion-parameter checkpoint in one shard: speed, and peak memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

LAYERS, HIDDEN, INTERMEDIATE, VOCABULARY = 28, 2048, 8192, 32000


def generate(folder: Path, layers: int = LAYERS) -> int:
    """Write a Llama-shaped bfloat16 checkpoint of random weights as one shard; returns its parameters."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "dtype": "bfloat16",
        "intermediate_size": INTERMEDIATE, "num_hidden_layers": layers, "num_attention_heads": 16,
        "num_key_value_heads": 16, "vocab_size": VOCABULARY, "tie_word_embeddings": False,
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("model.embed_tokens", "lm_head"), (VOCABULARY, HIDDEN))
    shapes["model.norm"] = (HIDDEN,)
    for k in range(layers):
        inside = {f"self_attn.{p}_proj": (HIDDEN, HIDDEN) for p in "qkvo"}
        inside |= dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (INTERMEDIATE, HIDDEN))
        inside["mlp.down_proj"] = (HIDDEN, INTERMEDIATE)
        shapes |= {f"model.layers.{k}.{name}": shape for name, shape in inside.items()}
        shapes |= dict.fromkeys((f"model.layers.{k}.{n}_layernorm" for n in ("input", "post_attention")), (HIDDEN,))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{name}.weight": torch.randn(shape, generator=generator).mul_(0.02).bfloat16()
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return sum(tensor.numel() for tensor in tensors.values())


CHILD = """
import json, re, sys, time
from pathlib import Path
from losparse_cli.budget.recipe import Recipe
from losparse_cli.compress import run
from losparse_cli.compress import plan
start = time.monotonic()
job = plan(sys.argv[1], Path(sys.argv[2]), Recipe(rank=8, sparsity=0.9, iterations=1), device="cpu")
planned = time.monotonic() - start
result = run(job)
seconds = json.loads((result.output / "losparse_timing.json").read_text())["seconds"]
print(json.dumps({"plan": planned, "run": result.seconds, "solve": sum(seconds.values()),
    "peak": 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]),
    "estimate": job.peak_memory,
    "after": result.report.model_bytes_after}))
"""


def streaming() -> None:
    """Seconds, parameters a second and peak resident memory of one `compress` in a process of its own."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("LOSPARSE_BENCH_DIR")) as place:
        parameters = generate(Path(place) / "model")
        nbytes = sum(path.stat().st_size for path in (Path(place) / "model").glob("*.safetensors"))
        child = [sys.executable, "-c", CHILD, f"{place}/model", f"{place}/result"]
        measured = json.loads(subprocess.run(child, check=True, capture_output=True, text=True).stdout)
        start = time.perf_counter()
        for path in sorted((Path(place) / "model").glob("*.safetensors")):
            with open(path, "rb", buffering=0) as file:
                while file.read(16 << 20):
                    pass
        reading = time.perf_counter() - start
        start = time.perf_counter()
        with open(f"{place}/floor", "wb", buffering=0) as file:
            piece = bytes(16 << 20)
            for _ in range(measured["after"] // len(piece)):
                file.write(piece)
            os.fsync(file.fileno())
        writing = time.perf_counter() - start
    print(f"{parameters:,} parameters, {nbytes / 1e9:.2f} GB of bfloat16 in one shard; rank 8, sparsity 0.9,")
    print("one iteration\n")
    print("| | |")
    print("|---|---|")
    print(f"| whole run | {measured['run']:.1f} s |")
    print(f"| speed | {parameters / measured['run'] / 1e6:.1f} million parameters a second |")
    print(f"| of it solving and encoding layers | {measured['solve']:.1f} s |")
    print(f"| planning, before the run | {measured['plan']:.1f} s |")
    print(f"| floor: reading the files (warm cache) and writing the result | {reading:.1f} s + {writing:.1f} s |")
    print(f"| peak resident memory | {measured['peak'] / 2**30:.2f} GiB |")
    print(f"| peak memory that --dry-run predicts | {measured['estimate'] / 2**30:.2f} GiB |")


def startup(runs: int = 7) -> None:
    """Seconds of `losparse --help`, median."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "losparse_cli", "--help"], check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    print(f"`losparse --help`: {sorted(times)[runs // 2]:.2f} s")
