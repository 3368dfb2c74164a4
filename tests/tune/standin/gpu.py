"""Stands in for a GPU and its hipBLASLt in a process of megatron_rocm.tune.worker, on a CPU.

Products are cut to at most CUT in each dimension, and computed by what HIPBLASLT_TUNING_OVERRIDE_FILE or
PYTORCH_TUNABLEOP_FILENAME names, read here as the libraries read them; every product is logged as hipBLASLt does with
HIPBLASLT_LOG_MASK=32.

    python gpu.py TASK.json ANSWER.jsonl    # the worker, with it
"""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

CUT = 192


def stand_in() -> None:
    import torch
    from kernels import CRASHES, DEFAULT, REVISION, product

    from megatron_rocm.tune import judge, library, products
    from megatron_rocm.tune.shapes import Gemm
    from megatron_rocm.tune.tunable import operator

    types = {"bf16": "bf16_r", "fp16": "f16_r", "fp32": "f32_r"}
    chosen, tunable, calls = overridden(REVISION), Tunable(), Counter[str]()

    def multiply(gemm: Gemm, a: Any, b: Any, into: Any) -> Any:
        key = (gemm.layout[0] == "T", gemm.layout[1] == "T", gemm.m, gemm.n, gemm.k, types[gemm.dtype], types[gemm.out])
        name = tunable.kernel(operator(gemm))
        index = int(name.rpartition("_")[2]) if name.startswith("Gemm_Hipblaslt_") else chosen.get(key, DEFAULT)
        if os.environ.get("HIPBLASLT_LOG_MASK") == "32":
            with open(os.environ["HIPBLASLT_LOG_FILE"], "a") as log:
                said = {
                    "-m": gemm.m, "-n": gemm.n, "-k": gemm.k, "--alpha": 1.0, "--beta": 0.0, "--transA": gemm.layout[0],
                    "--transB": gemm.layout[1], "--batch_count": 1, "--a_type": types[gemm.dtype],
                    "--b_type": types[gemm.dtype], "--c_type": types[gemm.out], "--d_type": types[gemm.out],
                    "--compute_type": "f32_r", "--algo_method": "index", "--solution_index": index,
                }  # fmt: skip
                words = (str(word) for pair in said.items() for word in pair)
                print("hipblaslt-bench --api_method c", *words, file=log)
        if index == CRASHES:
            os.kill(os.getpid(), signal.SIGSEGV)
        calls[gemm.key] += 1
        left, right = products.factors(gemm, a, b)
        return product(index, calls[gemm.key] - 1, left, right, into, products.DTYPES[gemm.out])

    whole_judge = judge.judge

    def cut(gemm: Gemm) -> Gemm:
        return replace(gemm, m=min(gemm.m, CUT), n=min(gemm.n, CUT), k=min(gemm.k, CUT))

    def small_judge(gemm: Gemm, device: Any) -> Any:
        return whole_judge(cut(gemm), device, lambda _, a, b, into: multiply(gemm, a, b, into))

    whole_operands = judge.operands
    judge.judge = small_judge  # type: ignore[assignment]
    judge.operands = lambda gemm, values, device, seed: whole_operands(cut(gemm), values, device, seed)
    products.multiply = multiply
    products.device = lambda: torch.device("cpu")
    library.file = lambda: os.environ.get("STANDIN_LIBRARY", "")
    library.revision = lambda: os.environ.get("STANDIN_REVISION", REVISION)
    library.tunable_results = lambda: [(*key, name) for key, name in tunable.known.items()]


def overridden(revision: str) -> dict[tuple[Any, ...], int]:
    """The override file as hipBLASLt reads it: nothing of another build, by headings or else by the old 37 columns."""
    path = os.environ.get("HIPBLASLT_TUNING_OVERRIDE_FILE")
    if not path:
        return {}
    first, *lines = Path(path).read_text().splitlines()
    if first != f"Git Version: {os.environ.get('STANDIN_REVISION', revision)}" or "STANDIN_DEAF" in os.environ:
        return {}
    found, headings = {}, []
    for cells in (line.strip().split(",") for line in lines):
        if cells[0] == "transA":
            headings = cells
            continue
        row = dict(zip(headings, cells, strict=True)) if headings else None
        if row is None:
            assert len(cells) == 37
            names = ("transA", "transB", "m", "n", "k", "a_type", "d_type", "solution_index")
            row = dict(zip(names, (cells[at] for at in (0, 1, 4, 5, 6, 17, 20, 34)), strict=True))
        sizes = (int(row[name]) for name in ("m", "n", "k"))
        key = (row["transA"] != "N", row["transB"] != "N", *sizes, row["a_type"], row["d_type"])
        found[key] = int(row["solution_index"])
    return found


class Tunable:
    """TunableOp as torch's README has it: its file's name with the GPU's number, kernels timed where tuning is on."""

    VALIDATORS = ("Validator,PT_VERSION,2.10.0", "Validator,GCN_ARCH_NAME,gfx942:sramecc+:xnack-")

    def __init__(self) -> None:
        self.on = os.environ.get("PYTORCH_TUNABLEOP_ENABLED") == "1"
        self.tunes = os.environ.get("PYTORCH_TUNABLEOP_TUNING", "1") == "1"
        self.path = Path(os.environ.get("PYTORCH_TUNABLEOP_FILENAME", "tunableop_results.csv").replace("%d", "0"))
        self.known: dict[tuple[str, str], str] = {}
        lines = self.path.read_text().splitlines() if self.on and self.path.exists() else []
        if lines[: len(self.VALIDATORS)] == list(self.VALIDATORS):
            self.known = {(cells[0], cells[1]): cells[2] for cells in (line.split(",") for line in lines[2:])}

    def kernel(self, key: tuple[str, str]) -> str:
        if self.on and self.tunes and key not in self.known:
            self.known[key] = os.environ["STANDIN_TUNED"]
            rows = (f"{','.join(one)},{name},0.0705" for one, name in self.known.items())
            self.path.write_text("".join(f"{line}\n" for line in (*self.VALIDATORS, *rows)))
        return self.known.get(key, "") if self.on else ""


if __name__ == "__main__":
    stand_in()
    from megatron_rocm.tune.worker import main

    sys.exit(main(sys.argv[1:]))
