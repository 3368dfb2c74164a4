#!/usr/bin/env python3
"""Training speed on this machine's CPU: the tiny Llama by train_llama3.sh and by Hugging Face transformers.

Both train the same shape in FP32 on random tokens with AdamW and clipping, in turns, with all cores; tokens/s are
those of the median step after the first two. The ratio is ours over theirs: above 1, ours is faster.

    python benchmarks/train_cpu.py [--steps 12] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SEQUENCES, LENGTH, WARMUP = 8, 512, 2
PEER = """
import json, sys, time, torch
from transformers import LlamaConfig, LlamaForCausalLM
sequences, length, steps, shape = json.loads(sys.argv[1])
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(**shape, attn_implementation="sdpa", use_cache=False)).train()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
times = []
for _ in range(steps):
    start = time.perf_counter()
    tokens = torch.randint(0, shape["vocab_size"], (sequences, length))
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    loss.item()
    times.append(time.perf_counter() - start)
print(json.dumps(times))
"""


def ours(steps: int, folder: Path) -> list[float]:
    """Seconds per step of train_llama3.sh, from its metrics."""
    words = {
        "MODEL_SIZE": "tiny", "TARGET": "cpu", "TOTAL_ITERS": steps, "MBS": SEQUENCES, "BS": SEQUENCES,
        "SEQ_LENGTH": LENGTH, "LOG_DIR": folder, "TEE_OUTPUT": 0, "TENSORBOARD": 0,
    }  # fmt: skip
    script = ["bash", str(ROOT / "examples/llama/train_llama3.sh"), *(f"{key}={value}" for key, value in words.items())]
    subprocess.run(script, check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["iteration_ms"] / 1000 for row in rows if "iteration_ms" in row]


def theirs(steps: int, folder: Path) -> list[float]:
    """Seconds per step of a plain loop over transformers' Llama with the shape that ours resolved to."""
    model = json.loads((folder / "run.json").read_text())["model"]
    shape = {
        "vocab_size": model["padded_vocab_size"], "hidden_size": model["hidden_size"],
        "intermediate_size": model["ffn_hidden_size"], "num_hidden_layers": model["num_layers"],
        "num_attention_heads": model["num_attention_heads"], "num_key_value_heads": model["num_query_groups"],
        "max_position_embeddings": LENGTH, "tie_word_embeddings": model["tied_embeddings"],
    }  # fmt: skip
    command = [sys.executable, "-c", PEER, json.dumps([SEQUENCES, LENGTH, steps, shape])]
    threads = str(len(os.sched_getaffinity(0)))
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": threads}
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Run both in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    speeds: dict[str, list[float]] = {"megatron-rocm": [], "transformers": []}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(chosen.rounds):
            folder = Path(scratch) / str(number)
            for name, run in (("megatron-rocm", ours), ("transformers", theirs)):
                times = run(chosen.steps, folder)[WARMUP:]
                speeds[name].append(SEQUENCES * LENGTH / statistics.median(times))
    for name, values in speeds.items():
        rounds = " ".join(f"{value:.0f}" for value in values)
        print(f"{name:14} {statistics.median(values):8.0f} tokens/s   rounds: {rounds}")
    ours_median, theirs_median = (statistics.median(values) for values in speeds.values())
    print(f"ratio          {ours_median / theirs_median:8.2f}")


if __name__ == "__main__":
    main()
