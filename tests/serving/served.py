"""Greedy tokens of a checkpoint in vLLM, as JSON: python -m tests.serving.served FOLDER [--compiled] [--ranks N]."""

from __future__ import annotations

import argparse
import json
from typing import Any

PROMPTS = [[5, 17, 30, 42, 9, 71, 77], [12, 13, 14, 20, 7, 8, 9, 10, 11]]
TOKENS = 64


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--lora")
    given = parser.parse_args()
    import vllm

    more: dict[str, Any] = {"tensor_parallel_size": given.ranks} if given.ranks > 1 else {}
    if given.lora:
        more["enable_lora"] = True
    engine = vllm.LLM(
        given.folder, dtype=given.dtype, enforce_eager=not given.compiled, max_model_len=128, max_num_seqs=2,
        skip_tokenizer_init=True, enable_prefix_caching=False, **more,
    )  # fmt: skip
    asked = vllm.SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
    request = vllm.lora.request.LoRARequest("own", 1, given.lora) if given.lora else None
    found = engine.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], asked, lora_request=request)
    print("tokens", json.dumps([list(one.outputs[0].token_ids) for one in found]))


if __name__ == "__main__":
    main()
