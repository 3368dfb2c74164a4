"""PyTorch's TunableOp: torch tries the kernels of rocBLAS and hipBLASLt itself, at the first call of each product.

It sees what torch itself multiplies, not what Transformer Engine does. In a build for CUDA it knows one kernel, the
default. Sources: torch/cuda/tunable.py and, for the names of operators and parameters,
torch/include/ATen/cuda/tunable/TunableGemm.h and GemmCommon.h.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from megatron_rocm.tune.shapes import Dtype, Gemm
from megatron_rocm.tune.trial import Answer
from megatron_rocm.tune.tuned import By, Candidate, library_files

DEFAULT = "Default"
TYPES: dict[Dtype, str] = {"bf16": "BFloat16", "fp16": "Half", "fp32": "float"}

Try = Callable[[Sequence[Gemm], Mapping[str, str]], Answer]  # multiplies once, in a process with these variables


def operator(gemm: Gemm) -> tuple[str, str]:
    """A product as the file names it: operator and parameters."""
    lda = gemm.k if gemm.layout[0] == "T" else gemm.m
    ldb = gemm.n if gemm.layout[1] == "T" else gemm.k
    sizes = f"{gemm.m}_{gemm.n}_{gemm.k}_ld_{lda}_{ldb}_{gemm.m}"
    return f"GemmTunableOp_{TYPES[gemm.dtype]}_{gemm.layout}", f"{gemm.layout.lower()}_{sizes}"


class TunableOp:
    """Tunes by torch itself; `attempt` multiplies in a process of its own."""

    by: By = "tunableop"

    def __init__(self, attempt: Try, folder: Path, gemms: Sequence[Gemm]) -> None:
        self._try = attempt
        self.folder = folder
        self._operators = {gemm.key: operator(gemm) for gemm in gemms}
        self._rest = [gemm for gemm in gemms if not self.reaches(gemm)]
        self._validators: list[str] = []
        self._found: dict[tuple[str, str], Candidate] = {}

    def reaches(self, gemm: Gemm) -> str:
        """Why the file has no say in this product; "" where it has."""
        if gemm.by == "torch":
            return ""
        who = "Transformer Engine asks hipBLASLt" if gemm.by == "te" else "Apex's kernel asks rocBLAS"
        return f"{who} itself, past TunableOp"

    def candidates(self, gemm: Gemm) -> list[Candidate]:
        """The fastest kernel with its time: torch keeps no other; none where that is the default."""
        if self._rest:
            self._tune()
        found = self._found.get(operator(gemm))
        return [found] if found else []

    def _tune(self) -> None:
        """Have torch try its kernels for all products. One that kills its process is left out of the next."""
        environment = {
            "PYTORCH_TUNABLEOP_ENABLED": "1",
            "PYTORCH_TUNABLEOP_TUNING": "1",
            "PYTORCH_TUNABLEOP_FILENAME": str(self.folder / "trial%d.csv"),
            "PYTORCH_TUNABLEOP_ROTATING_BUFFER_SIZE": "512",
        }
        while self._rest:
            tried = self._try(self._rest, environment).rulings
            self._rest = [gemm for gemm in self._rest if gemm.key not in tried]
        for written in self.folder.glob("trial*.csv"):
            lines = written.read_text().splitlines()
            self._validators = [line for line in lines if line.startswith("Validator,")]
            for cells in (line.split(",") for line in lines if line not in self._validators):
                if len(cells) > 2 and cells[2] != DEFAULT:
                    us = float(cells[3]) * 1e3 if len(cells) > 3 else 0.0
                    self._found[cells[0], cells[1]] = Candidate(cells[2], us)

    def default(self, gemm: Gemm, candidates: Sequence[Candidate], answer: Answer) -> Candidate | None:
        """Not known: torch keeps the fastest alone, and its time."""
        return None

    def applied(self, gemm: Gemm, candidate: Candidate, answer: Answer) -> str:
        """Why torch does not take this kernel; "" where it does."""
        known = (*operator(gemm), candidate.kernel) in answer.results
        return "" if known else "torch does not accept its own file here"

    def write(self, folder: Path, chosen: Mapping[str, Candidate], gpus: int) -> list[str]:
        """Write the results file once for each GPU of the node; their names."""
        rows = [
            ",".join((*self._operators[key], kernel.kernel, f"{kernel.us / 1e3}")) for key, kernel in chosen.items()
        ]
        names = library_files(self.by, gpus)
        for name in names:
            (folder / name).write_text("".join(f"{line}\n" for line in (*self._validators, *rows)))
        return names
