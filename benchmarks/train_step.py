#!/usr/bin/env python3
"""Speed and memory of one training step: ours, Hugging Face transformers and, on a GPU, torchtitan.

    python benchmarks/train_step.py [--rounds 12] [--precision fp32|bf16|all]

All train the same Llama on the same kind of batch: forward, backward, clipping to a norm of 1, AdamW. Each contender is
a process of its own, which lives through all rounds; in each round every contender does two steps, alone, in an order
that turns from round to round, and the faster counts: what others take of the machine makes a step slower, never
faster. So a ratio compares two steps that were seconds apart, and its 95 % interval (bootstrap over the rounds, of the
median) says how far the machine's unrest could have moved it. Where others use the machine all the time, the processes'
CPU time is the better measure. Peak memory is the whole process's, libraries included; on a GPU, what
torch has allocated.

    megatron-rocm         the step of `train_llama3.sh` in one process, by the same code; BF16 has FP32 master weights
    transformers          LlamaForCausalLM, not compiled, SDPA, loss by `labels=`, torch's fused AdamW without decay of
                          norms, gradients set to None; FP32 weights, in BF16 under torch.autocast, which makes them
                          FP32 master weights, as ours
    …, with our malloc    the same in the environment that our launcher gives processes on a CPU, where large blocks of
                          memory are kept from step to step and come in huge pages: what is left then is
                          the work itself
    transformers, pure    weights, gradients and AdamW's moments all in BF16: less work and memory, at a loss of
                          precision; for information
    torchtitan            0.2: its Llama 3 with layers and loss compiled, as its trainer does, FP32 weights under
                          torch.autocast; its output layer is not tied

The shape on a CPU is Llama 3.2 1B with a quarter of its width and vocabulary and half of its layers; on a GPU it is
Llama 3.2 1B.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
STEPS = 2  # of each contender in a round
WARMUP = 2  # steps before the first round: allocators, kernels' choices, AdamW's state
LR, BETAS, EPS, DECAY, CLIP = 3e-4, (0.9, 0.95), 1e-8, 0.1, 1.0

Step = Callable[[], float]  # does one step, returns its loss


@dataclass(frozen=True)
class Shape:
    """A Llama and its batch."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    vocabulary: int
    sequences: int
    length: int
    device: str

    @property
    def tokens(self) -> int:
        return self.sequences * self.length


SHAPES = {
    "cpu": Shape(8, 512, 2048, 8, 2, 32_064, 4, 512, "cpu"),
    "gpu": Shape(16, 2048, 8192, 32, 8, 128_256, 2, 4096, "cuda"),
}


def resolved(shape: Shape, precision: str) -> Any:
    """Our run of one process: its configuration, but for the shape, and its environment."""
    sys.path.insert(0, str(ROOT))
    from megatron_rocm.config.request import read
    from megatron_rocm.platform import machine
    from megatron_rocm.resolve import resolve

    words = [
        "MODEL_SIZE=1", f"MBS={shape.sequences}", f"BS={shape.sequences}", f"SEQ_LENGTH={shape.length}", "TP=1",
        f"PRECISION={precision}", f"LR={LR}", f"MIN_LR={LR}", "GPUS_PER_NODE=1", "TOTAL_ITERS=1000000",
        *(["TARGET=cpu"] if shape.device == "cpu" else []),
    ]  # fmt: skip
    request = read("llama3", words, {}, ())
    return resolve(request, machine.find(request.text("TARGET"), {}), {})


def ours(shape: Shape, precision: str) -> Step:
    """megatron-rocm's own step for a run of one process."""
    run = resolved(shape, precision).config
    from megatron_rocm.platform import cpu

    cpu.install()
    import torch

    from megatron_rocm.train import distributed, loop, step

    padded = -(-shape.vocabulary // 128) * 128
    sizes = {
        "num_layers": shape.layers, "hidden_size": shape.hidden, "ffn_hidden_size": shape.ffn,
        "num_attention_heads": shape.heads, "num_query_groups": shape.groups,
        "kv_channels": shape.hidden // shape.heads, "vocab_size": shape.vocabulary, "padded_vocab_size": padded,
    }  # fmt: skip
    run = run.model_copy(update={"model": run.model.model_copy(update=sizes)})
    distributed.connect(run)
    distributed.form_groups(run)
    state = loop.build(run)
    step.prepare(run, state)

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        positions = torch.arange(shape.length).expand(shape.sequences, -1)
        while True:
            tokens = torch.randint(0, shape.vocabulary, (shape.sequences, shape.length + 1))
            yield {
                "tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous(),
                "position_ids": positions, "loss_mask": torch.ones(shape.sequences, shape.length),
            }  # fmt: skip

    data = [batches()]
    return lambda: step.train_step(run, state, data).loss  # type: ignore[arg-type]


def transformers(shape: Shape, precision: str) -> Step:
    """A plain loop over LlamaForCausalLM; `precision` is fp32, bf16 (autocast) or pure (BF16 throughout)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.ffn,
            num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.groups,
            max_position_embeddings=131_072, tie_word_embeddings=True, attn_implementation="sdpa", use_cache=False,
        )
    )  # fmt: skip
    model = model.to(shape.device, torch.bfloat16 if precision == "pure" else torch.float32).train()

    def loss_of(tokens: torch.Tensor) -> torch.Tensor:
        with torch.autocast(shape.device, torch.bfloat16) if precision == "bf16" else nullcontext():
            return model(input_ids=tokens, labels=tokens).loss

    return plain_step(shape, model, loss_of)


def torchtitan(shape: Shape, precision: str) -> Step:
    """torchtitan's Llama 3 model with its own way of compiling, in a plain loop on one GPU."""
    import torch
    from torchtitan.models.llama3 import Transformer, TransformerModelArgs

    args = TransformerModelArgs(
        dim=shape.hidden, n_layers=shape.layers, n_heads=shape.heads, n_kv_heads=shape.groups,
        vocab_size=shape.vocabulary, ffn_dim_multiplier=1.5, multiple_of=256, rope_theta=500_000,
        max_seq_len=shape.length,
    )  # fmt: skip
    with torch.device(shape.device):
        model = Transformer(args)
        model.init_weights()
    for number, layer in model.layers.named_children():
        model.layers.register_module(number, torch.compile(layer, fullgraph=True))
    cross_entropy = torch.compile(lambda logits, labels: torch.nn.functional.cross_entropy(logits.float(), labels))

    def loss_of(tokens: torch.Tensor) -> torch.Tensor:
        with torch.autocast(shape.device, torch.bfloat16) if precision == "bf16" else nullcontext():
            logits = model(tokens)
        return cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    return plain_step(shape, model, loss_of)


def plain_step(shape: Shape, model: Any, loss_of: Callable[[Any], Any]) -> Step:
    """The step of a loop without a framework, each part in the fastest form that torch has."""
    import torch

    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": DECAY},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS, fused=True)

    def step() -> float:
        tokens = torch.randint(0, shape.vocabulary, (shape.sequences, shape.length)).to(shape.device)
        loss = loss_of(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


@dataclass(frozen=True)
class Contender:
    """Somebody's training step: how to build it, and which packages it needs."""

    title: str
    precision: str
    make: Callable[[Shape, str], Step]
    needs: tuple[str, ...]
    devices: tuple[str, ...] = ("cpu", "gpu")
    mode: str = ""  # what `make` is told, where it is not the precision
    settings: bool = False  # whether its process has the environment that our launcher makes

    def build(self, shape: Shape) -> Step:
        return self.make(shape, self.mode or self.precision)


CONTENDERS = {
    "ours_fp32": Contender("megatron-rocm", "fp32", ours, ("torch", "megatron-core"), settings=True),
    "hf_fp32": Contender("transformers", "fp32", transformers, ("torch", "transformers")),
    "hf_fp32_kept": Contender(
        "transformers, with our malloc", "fp32", transformers, ("torch", "transformers"), ("cpu",), settings=True
    ),
    "ours_bf16": Contender("megatron-rocm", "bf16", ours, ("torch", "megatron-core"), settings=True),
    "hf_bf16": Contender("transformers, autocast", "bf16", transformers, ("torch", "transformers")),
    "hf_bf16_kept": Contender(
        "transformers, autocast, with our malloc",
        "bf16",
        transformers,
        ("torch", "transformers"),
        ("cpu",),
        settings=True,
    ),
    "hf_pure": Contender("transformers, pure BF16", "bf16", transformers, ("torch", "transformers"), mode="pure"),
    "titan_bf16": Contender("torchtitan", "bf16", torchtitan, ("torchtitan>=0.2,<0.3",), devices=("gpu",)),
}


def peak_memory(device: str) -> int:
    """Most bytes that this process has had so far: of the GPU's memory by torch, or of the machine's."""
    import torch

    if device == "gpu":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def child(name: str, device: str) -> None:
    """One contender: a step for each line read, answered by its seconds and loss; its peak memory at the end."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries that print must not answer for us
    import torch

    torch.manual_seed(0)
    step = CONTENDERS[name].build(SHAPES[device])
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # ours has set those of the machine
    for _ in range(WARMUP):
        step()
    print("ready", file=answers)
    for _ in sys.stdin:
        if device == "gpu":
            torch.cuda.synchronize()
        start, used = time.perf_counter(), time.process_time()
        loss = step()  # reads the loss: a GPU is done then with all but AdamW's last kernels
        if device == "gpu":
            torch.cuda.synchronize()
        answer = {
            "seconds": time.perf_counter() - start,
            "cpu": time.process_time() - used,
            "loss": loss,
            "memory": peak_memory(device),
        }
        print(json.dumps(answer), file=answers)


class Process:
    """A contender's process, seen from outside."""

    def __init__(self, name: str, device: str, threads: int) -> None:
        contender = CONTENDERS[name]
        self.title = contender.title
        settings = resolved(SHAPES[device], contender.precision).environment if contender.settings else {}
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))},
            **{name: value for name, (value, _) in settings.items() if value},
            "OMP_NUM_THREADS": str(threads), "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--child", name, "--device", device],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        self.seconds: list[float] = []
        self.cpu: list[float] = []
        self.memory = 0
        self.loss = 0.0

    def ready(self) -> None:
        self._answer()

    def step(self) -> None:
        assert self.process.stdin
        answers = []
        for _ in range(STEPS):
            print("step", file=self.process.stdin, flush=True)
            answers.append(json.loads(self._answer()))
        self.seconds.append(min(answer["seconds"] for answer in answers))
        self.cpu.append(min(answer["cpu"] for answer in answers))
        self.memory, self.loss = answers[-1]["memory"], answers[-1]["loss"]

    def _answer(self) -> str:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.title} ended with exit status {self.process.wait()}; its error is above")
        return line

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def interval(ratios: Sequence[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the median."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(10_000))
    return medians[250], medians[9750]


def compare(precision: str, device: str, rounds: int, threads: int) -> list[str]:
    """All contenders of one precision in turns; the rows of the table."""
    chosen = [name for name, one in CONTENDERS.items() if one.precision == precision and device in one.devices]
    contenders: list[Process] = []
    try:
        for name in chosen:  # one after the other: side by side they would warm up on each other's cores
            if package := missing(name):
                print(f"{CONTENDERS[name].title}: skipped, {package} is not installed", file=sys.stderr)
                continue
            contenders.append(Process(name, device, threads))
            contenders[-1].ready()
        for number in range(rounds):
            first = number % len(contenders)
            for contender in contenders[first:] + contenders[:first]:
                contender.step()
            seconds = " ".join(f"{contender.seconds[-1]:.2f}" for contender in contenders)
            print(f"{precision} round {number + 1}/{rounds}: {seconds} s", file=sys.stderr)
    finally:
        for contender in contenders:
            contender.end()

    mine = contenders[0]
    rows = []
    for contender in contenders:
        speed = SHAPES[device].tokens / statistics.median(contender.seconds)
        cells = [precision.upper(), contender.title, f"{speed:.0f}", f"{contender.memory / 2**20:.0f}", "", "", ""]
        if contender is not mine:
            ratios = quotients(contender.seconds, mine.seconds)
            low, high = interval(ratios)
            cells[4] = f"{statistics.median(ratios):.2f} ({low:.2f} to {high:.2f})"
            cells[5] = f"{statistics.median(quotients(contender.cpu, mine.cpu)):.2f}"
            cells[6] = f"{mine.memory / contender.memory:.2f}"
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def quotients(theirs: Sequence[float], ours: Sequence[float]) -> list[float]:
    """Of the rounds, one by one."""
    return [one / other for one, other in zip(theirs, ours, strict=True)]


def missing(name: str) -> str:
    """A package that this contender lacks here, "" where it has all."""
    for package in map(Requirement, CONTENDERS[name].needs):
        try:
            fits = metadata.version(package.name) in package.specifier
        except metadata.PackageNotFoundError:
            fits = False
        if not fits:
            return str(package)
    return ""


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def main() -> None:
    """Run the contenders in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--precision", choices=("fp32", "bf16", "all"), default="all")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each contender")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--device", choices=("cpu", "gpu"), help="a GPU if torch sees one")
    chosen = parser.parse_args()
    if chosen.rounds < 1:
        parser.error(f"--rounds {chosen.rounds}: must be 1 or more")
    if chosen.child:
        child(chosen.child, chosen.device)
        return
    device = chosen.device or ("gpu" if has_gpu() else "cpu")
    precisions = ("fp32", "bf16") if chosen.precision == "all" else (chosen.precision,)
    rows = [row for precision in precisions for row in compare(precision, device, chosen.rounds, chosen.threads)]
    shape = SHAPES[device]
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "megatron-core", "transformers"))
    print(
        f"\n{shape.layers} layers, hidden {shape.hidden}, FFN {shape.ffn}, {shape.heads} heads, {shape.groups} groups, "
        f"vocabulary {shape.vocabulary},\n{shape.sequences} × {shape.length} tokens a step, {chosen.threads} threads, "
        f"{chosen.rounds} rounds; {versions}\n"
    )
    print("| | | tokens/s | peak memory, MiB | our speed to theirs | their CPU time to ours | our memory to theirs |")
    print("|---|---|---:|---:|---:|---:|---:|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
