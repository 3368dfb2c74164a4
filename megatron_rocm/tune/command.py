"""`megatron-rocm tune`: a run's matrix products, the fastest right kernel for each, and the file for GEMM_TUNING."""

from __future__ import annotations

import argparse
import datetime
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from megatron_rocm.config.request import RunRequest, read
from megatron_rocm.errors import UsageError
from megatron_rocm.launch.train import FAMILIES
from megatron_rocm.platform import machine
from megatron_rocm.platform.machine import Machine
from megatron_rocm.platform.settings import LIBRARY_PREFIXES
from megatron_rocm.resolve import Resolution, resolve
from megatron_rocm.tune import bench
from megatron_rocm.tune.bench import Bench
from megatron_rocm.tune.choose import Tuner, choose, distinct
from megatron_rocm.tune.shapes import Gemm, gemms
from megatron_rocm.tune.trial import Answer, Trials
from megatron_rocm.tune.tunable import TunableOp
from megatron_rocm.tune.tuned import Candidate, Product, Tuned, digests, rival_of
from megatron_rocm.tune.versions import stamp, torch_build

FILE = "tuned.json"
MOST = 8
OPTIONS = ("OUT", "CANDIDATES")  # may be typed as KEY=VALUE too
HELP = f"""megatron-rocm tune [--family {"|".join(FAMILIES)}] [--out FOLDER] [--candidates N]
                   [KEY=VALUE …] [FILE.yaml …]

Finds the matrix products that one GPU does in a training step, has {bench.PROGRAM} time every kernel of hipBLASLt for
each (where it is missing, PyTorch's TunableOp times those of rocBLAS and hipBLASLt), and keeps the fastest whose result
is right: it is compared with a float64 product, over several inputs, in a process that loads the kernel as training
does. KEY=VALUE are those of `megatron-rocm train`: your own configuration. DRY_RUN=1 lists the products alone.

  --family {"|".join(FAMILIES)}  whose sizes MODEL_SIZE names [llama3]
  --out FOLDER            where {FILE} goes, with what the library reads beside it [gemm_tuning/MODEL_SHAPE_GPU]
  --candidates N          kernels to judge for a product before it is left to the library [{MOST}]

Then train with GEMM_TUNING=FOLDER/{FILE}. It is refused where the GPU, its driver, the libraries or the shapes are not
those that it was made with (docs/tuning.md).

Exit status: 0 also where there is nothing to tune (NVIDIA, a CPU), 2 a mistake in the command."""

NOTHING = {
    "cpu": "nothing to tune: on a CPU torch's libraries choose their kernels themselves, and read no file",
    "nvidia": "nothing to tune: {torch} knows one kernel a product, cuBLASLt's own choice (TunableOp lists the default "
    "alone), and cuBLASLt reads no file. GEMM_TUNING has no effect on NVIDIA",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"tune: {message}; `megatron-rocm tune --help` shows the usage")


def main(arguments: Sequence[str]) -> int:
    """Tune. Raises UsageError for what can't be tuned here."""
    if "--help" in arguments or "-h" in arguments:
        print(HELP)
        return 0
    words = []
    for word in arguments:
        name, _, value = word.partition("=")
        words += [f"--{name.lower()}", value] if name in OPTIONS else [word]
    parser = _Parser(prog="megatron-rocm tune", add_help=False, allow_abbrev=False)
    parser.add_argument("--family", choices=FAMILIES, default="llama3")
    parser.add_argument("--out", default="")
    parser.add_argument("--candidates", type=int, default=MOST)
    parser.add_argument("words", nargs="*")
    options = parser.parse_intermixed_args(words)
    if options.candidates < 1:
        raise UsageError(f"--candidates {options.candidates}: at least 1 kernel has to be judged")
    request = _request(options.family, options.words)
    here = machine.find(request.text("TARGET"), {**os.environ, **request.exports})
    dry = request.text("DRY_RUN") == "1"
    resolution = resolve(request, here, dict(os.environ), dry_run=True)  # the shapes need neither data nor a network
    print("\n".join(_plan(resolution)))
    if dry:
        return 0
    if not here.is_here:
        raise UsageError(
            f"TARGET={request.text('TARGET')}: kernels are timed on the GPU itself; DRY_RUN=1 lists products"
        )
    if here.vendor == "cpu":
        print(NOTHING["cpu"])
        return 0
    out = Path(options.out) if options.out else _folder(resolution)
    _require_writable(out)  # before hours of work
    return _tune(resolution, out, options.candidates)


def _request(family: str, words: Sequence[str]) -> RunRequest:
    """What was said, less an older file: this command is what a person is told to type when one does not fit."""
    request = read(family, words, os.environ, LIBRARY_PREFIXES)
    if rival := rival_of({**os.environ, **request.exports}):
        raise UsageError(f"{rival} is set, and would choose the kernels that are to be compared: unset it")
    return replace(request, said={name: said for name, said in request.said.items() if name != "GEMM_TUNING"})


def _folder(resolution: Resolution) -> Path:
    run = resolution.config
    shape = f"tp{run.parallel.tp}_cp{run.parallel.cp}_mbs{run.training.micro_batch_size}_seq{run.training.seq_length}"
    return Path("gemm_tuning") / f"{run.model.family}_{run.model.size}_{shape}_{resolution.machine.arch}"


def _require_writable(out: Path) -> None:
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise UsageError(f"--out {out}: can't write in {there}: give a folder of yours")


def _plan(resolution: Resolution) -> list[str]:
    """The products as a table."""
    run, products = resolution.config, gemms(resolution.config)
    total = sum(gemm.flops * gemm.count for gemm in products)
    rows = [
        f"  {gemm.name:<5} {gemm.phase:<8} {gemm.m:>7} {gemm.n:>7} {gemm.k:>7}  {gemm.layout}  {_types(gemm):<11} "
        f"{gemm.count:>7}  {gemm.flops * gemm.count / total:5.1%}"
        for gemm in products
    ]
    head = f"{run.model.title}: {len(distinct(products))} matrix products on each GPU (column-major)"
    return [head, f"  {'':<14} {'m':>7} {'n':>7} {'k':>7}      {'types':<11} {'a step':>7}  share", *rows]


def _types(gemm: Gemm) -> str:
    return f"{gemm.dtype} → {'+' if gemm.accumulates else ''}{gemm.out}"


def _tune(resolution: Resolution, out: Path, most: int) -> int:
    here, products = resolution.machine, gemms(resolution.config)
    with tempfile.TemporaryDirectory() as folder:
        trials = Trials(resolution, Path(folder))
        tuner = _tuner(here, trials, products, Path(folder))
        if tuner is None:
            torch = torch_build()
            print(NOTHING["nvidia"].format(torch=f"torch {torch.get('__version__')} for CUDA {torch.get('cuda')}"))
            return 0

        def judge(some: Sequence[Gemm], chosen: Mapping[str, Candidate]) -> Answer:
            if not chosen:
                return trials("judge", some)
            file = Path(folder) / FILE
            _write(file, tuner, resolution, chosen, Answer(), [])
            return trials("judge", some, tuning=str(file))

        decided, first = choose(tuner, products, judge, most, print)
    chosen = {product.key: product.kernel for product in decided if product.kernel}
    print("\n".join(_result(decided)))
    if not chosen:
        print("no file was written: the library's own choices stay")
        return 0
    try:
        out.mkdir(parents=True, exist_ok=True)
        _write(out / FILE, tuner, resolution, chosen, first, decided)
    except OSError as error:
        raise UsageError(f"--out {out}: can't write there: {error.strerror}") from None
    print(f"train with GEMM_TUNING={out / FILE}")
    return 0


def _tuner(here: Machine, trials: Trials, products: Sequence[Gemm], folder: Path) -> Tuner | None:
    """The benchmark, or TunableOp; None where torch has no kernel but the default."""

    def attempt(some: Sequence[Gemm], more: Mapping[str, str]) -> Answer:
        return trials("try", some, more=more)

    if here.vendor == "nvidia":
        smallest = Gemm("try", "forward", 512, 512, 512, "TN", "bf16", "bf16", accumulates=False, count=1)
        known = TunableOp(attempt, folder, [smallest]).candidates(smallest)
        return TunableOp(attempt, folder, products) if known else None
    program = bench.find()
    if program:
        print(f"kernels of hipBLASLt, timed by {program}")
        return Bench(program, folder, os.environ)
    print(
        f"{bench.PROGRAM} is neither on PATH nor in ROCM_PATH: PyTorch's TunableOp tunes what torch itself multiplies"
    )
    return TunableOp(attempt, folder, products)


def _write(
    file: Path,
    tuner: Tuner,
    resolution: Resolution,
    chosen: Mapping[str, Candidate],
    first: Answer,
    decided: list[Product],
) -> None:
    here = resolution.machine
    names = tuner.write(file.parent, chosen, len(here.gpus))
    Tuned(
        by=tuner.by,
        title=resolution.config.model.title,
        made=f"{datetime.datetime.now():%Y-%m-%d %H:%M}",
        stamp=stamp(here, first.library),
        library=first.library,
        products=tuple(decided),
        files=digests(file.parent, names),
    ).save(file)


def _result(decided: Sequence[Product]) -> list[str]:
    """What became of each product, and what a step saves."""
    lines, saved = [], 0.0
    for product in decided:
        names = ", ".join(product.names)
        refused = f"; {len(product.refused)} refused" if product.refused else ""
        if product.kernel is None:
            lines.append(f"  {names:<28} left to the library: {product.why}{refused}")
            continue
        times = f"{product.default_us:.1f} → {product.kernel.us:.1f} µs" if product.default_us else "faster"
        lines.append(f"  {names:<28} kernel {product.kernel.kernel}: {times}{refused}")
        saved += max(0.0, product.default_us - product.kernel.us) * product.count
    return [*lines, f"{saved / 1e3:.1f} ms less for the matrix products of a step, on one GPU"]
