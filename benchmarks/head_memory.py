"""Measure the peak memory of a learning pass with a large vocabulary, relative to the memory of all its logits.

Run it as `python -m benchmarks.head_memory`. A Gemma 3 with one narrow layer and a vocabulary of 262,144 learns from 8
completions of 512 tokens on the CPU. Their logits in float32 would take 4.3 GB. The rise of the process's resident set
during the pass is measured. The layer is narrow so that it takes little memory compared to the head.
"""

import argparse
import json
import os
import resource
import time
from pathlib import Path

os.environ.setdefault("TUNIX_DEVICE", "cpu")  # even on a machine with a GPU

import tunix_torch  # noqa: F401  (first: it chooses the device)

# isort: split

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from tunix_torch.batch import TrainBatch
from tunix_torch.config.model import ModelConfig
from tunix_torch.learn.logprobs import token_logps
from tunix_torch.learn.passes import shared_prompts
from tunix_torch.model.loading import add_lora, lora_config, place


def resident_bytes() -> int:
    """Return the bytes of this process that are in memory now (its resident set)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def measure(vocabulary: int, rows: int, length: int, hidden: int = 64) -> dict[str, float]:
    """Return `extra_bytes` of the pass, `logits_bytes` of all logits in float32, their ratio, and the seconds."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=hidden,
    )
    model = place(add_lora(Gemma3ForCausalLM(config), lora_config(ModelConfig(lora_rank=4))))

    def learn(width: int) -> None:
        batch = TrainBatch(
            prompt_ids=torch.randint(vocabulary, (1, 8)),
            prompt_mask=torch.ones(1, 8, dtype=torch.bool),
            completion_ids=torch.randint(vocabulary, (rows, width)),
            completion_mask=torch.ones(rows, width, dtype=torch.bool),
            advantages=torch.ones(rows),
            token_weights=torch.ones(rows, width),
            lengths=torch.full((rows,), width),
        )
        logps, _ = token_logps(model, shared_prompts(batch))
        (-logps.sum()).backward()

    learn(1)  # so that memory which libraries allocate at first use does not count
    before, started = resident_bytes(), time.perf_counter()
    learn(length)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    extra, logits = peak - before, rows * length * vocabulary * 4
    return {
        "extra_bytes": extra,
        "logits_bytes": logits,
        "ratio": extra / logits,
        "seconds": time.perf_counter() - started,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabulary", type=int, default=262_144)
    parser.add_argument("--rows", type=int, default=8, help="completions")
    parser.add_argument("--length", type=int, default=512, help="tokens of each")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    result = measure(args.vocabulary, args.rows, args.length)
    if args.json:
        print(json.dumps(result))
    else:
        print(
            f"{result['extra_bytes'] / 1e6:.0f} MB more at the peak, {result['ratio']:.1%} of the "
            f"{result['logits_bytes'] / 1e6:.0f} MB that the logits take ({result['seconds']:.1f} s)"
        )


if __name__ == "__main__":
    main()
