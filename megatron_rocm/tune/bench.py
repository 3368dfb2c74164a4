"""hipBLASLt's own benchmark: every kernel for a product with its time, and the file that makes hipBLASLt take one.

Sources, in ROCm/rocm-libraries projects/hipblaslt: clients/bench/src/client.cpp (options),
clients/common/include/argument_model.hpp (what is printed and written to HIPBLASLT_TUNING_FILE),
UserDrivenTuningParser.cpp (how HIPBLASLT_TUNING_OVERRIDE_FILE is read), and
docs/how-to/how-to-use-hipblaslt-offline-tuning.rst.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_rocm.errors import UsageError
from megatron_rocm.platform.process import die_with_parent
from megatron_rocm.tune.shapes import Dtype, Gemm
from megatron_rocm.tune.trial import Answer
from megatron_rocm.tune.tuned import FILES, By, Candidate

PROGRAM = "hipblaslt-bench"
PLACES = ("bin", "clients/staging")  # under ROCM_PATH, for those who have not put it on PATH
TYPES: dict[Dtype, str] = {"bf16": "bf16_r", "fp16": "f16_r", "fp32": "f32_r"}
REVISION = "Git Version: "
SECONDS = 3600  # for the hundreds of kernels of one product

# Every kernel the library has for the product, best first by its own guess, with the least workspace of its callers (32
# MiB: Transformer Engine's on gfx942 and torch's default); 512 MiB of operands in rotation, as in training.
METHOD = (
    "--algo_method", "heuristic", "--requested_solution", "-1", "--workspace", str(32 * 2**20), "--rotating", "512",
    "--cold_iters", "20", "--iters", "50", "--print_kernel_info",
)  # fmt: skip
# What not every version has: an empty instruction cache, the GPU's own clock, and (Primus does so) those that are slow
# when warming up left out.
WHERE_KNOWN = (("--flush",), ("--use_gpu_timer",), ("--skip_slow_solution_ratio", "0.7"))
# What a line of hipBLASLt's log tells products apart by.
KEY = ("--transA", "--transB", "-m", "-n", "-k", "--a_type", "--d_type")
# Headings of the columns: older versions misspell the first.
INDEX = ("solution_index", "soulution_index")
NAMES = {"kernel_name": "kernel name", "solution_name": "Solution name"}
# Older files have no headings, but always 37 columns.
OLD_COLUMNS, OLD_INDEX = 37, 34


@dataclass(frozen=True)
class Row:
    """One product's line of a tuning file as the benchmark writes it, with its headings where it writes some."""

    headings: tuple[str, ...]
    values: tuple[str, ...]

    def of(self, candidate: Candidate, details: Mapping[str, str]) -> str:
        """The line (and its headings) with another kernel in it."""
        headings = self.headings or tuple("" if at != OLD_INDEX else INDEX[0] for at in range(OLD_COLUMNS))
        changed = {name: candidate.kernel for name in INDEX} | {
            name: details.get(printed, "") for name, printed in NAMES.items()
        }
        values = [changed.get(heading, value) for heading, value in zip(headings, self.values, strict=True)]
        return "".join(f"    {','.join(line)}\n" for line in (self.headings, values) if line)


def find(environment: Mapping[str, str] = os.environ) -> str | None:
    """The benchmark's program, on PATH or where ROCm puts it."""
    home = environment.get("ROCM_PATH", "/opt/rocm")
    for folder in (environment.get("PATH", os.defpath), *(f"{home}/{place}" for place in PLACES)):
        if found := shutil.which(PROGRAM, path=folder):
            return found
    return None


def command(program: str, gemm: Gemm, known: str) -> list[str]:
    """The line that tries every kernel for a product. `known` is the program's --help."""
    lda = gemm.k if gemm.layout[0] == "T" else gemm.m
    ldb = gemm.n if gemm.layout[1] == "T" else gemm.k
    problem = {
        "--api_method": "c", "-m": gemm.m, "-n": gemm.n, "-k": gemm.k, "--lda": lda, "--ldb": ldb, "--ldc": gemm.m,
        "--ldd": gemm.m, "--stride_a": 0, "--stride_b": 0, "--stride_c": 0, "--stride_d": 0, "--alpha": 1,
        "--beta": int(gemm.accumulates), "--transA": gemm.layout[0], "--transB": gemm.layout[1], "--batch_count": 1,
        "--a_type": TYPES[gemm.dtype], "--b_type": TYPES[gemm.dtype], "--c_type": TYPES[gemm.out],
        "--d_type": TYPES[gemm.out], "--scale_type": "f32_r", "--bias_type": "f32_r", "--compute_type": "f32_r",
    }  # fmt: skip
    more = (word for words in WHERE_KNOWN if words[0].strip("-") in known for word in words)
    return [program, *(str(word) for pair in problem.items() for word in pair), *METHOD, *more]


class Bench:
    """Tunes by the benchmark. Keeps each product's row, so that `write` needs only the kernels' indices."""

    by: By = "hipblaslt"

    def __init__(self, program: str, folder: Path, environment: Mapping[str, str]) -> None:
        self.program = program
        self.folder = folder
        self.environment = {name: value for name, value in environment.items() if not name.startswith("HIPBLASLT_")}
        self.revision = ""
        self._known = self._run([program, "--help"])
        self._rows: dict[str, Row] = {}
        self._details: dict[str, dict[str, dict[str, str]]] = {}

    def reaches(self, gemm: Gemm) -> str:
        """Why the file has no say in this product; "" where it has."""
        return "Apex's kernel asks rocBLAS, which reads no such file" if gemm.by == "apex" else ""

    def candidates(self, gemm: Gemm) -> list[Candidate]:
        """Kernels with their times, the library's first choice first. Raises UsageError in the benchmark's words."""
        file = self.folder / "row.txt"
        file.unlink(missing_ok=True)
        printed = self._run(command(self.program, gemm, self._known), HIPBLASLT_TUNING_FILE=str(file))
        kernels = parse(printed)
        if len(kernels) < 2:  # of one alone it writes no file
            return []
        self._rows[gemm.key] = self._row(file)
        self._details[gemm.key] = {kernel["index"]: kernel for kernel in kernels}
        return [Candidate(one["index"], float(one["us"]), one.get("kernel name", "")) for one in kernels]

    def _run(self, words: list[str], **variables: str) -> str:
        """What the benchmark prints."""
        try:
            done = subprocess.run(
                words,
                env={**self.environment, **variables},
                capture_output=True,
                text=True,
                timeout=SECONDS,
                preexec_fn=die_with_parent,
            )
        except OSError as error:
            raise UsageError(f"{self.program} can't be started: {error.strerror}") from None
        except subprocess.TimeoutExpired:
            raise UsageError(f"{' '.join(words)}: not done after {SECONDS} s") from None
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-3:]
            raise UsageError(f"{' '.join(words)}: exit status {done.returncode}: {' / '.join(said) or 'no word'}")
        return done.stdout

    def _row(self, file: Path) -> Row:
        try:
            lines = [line.strip() for line in file.read_text().splitlines()]
        except OSError:
            raise UsageError(f"{self.program} has written no HIPBLASLT_TUNING_FILE: take a newer ROCm") from None
        self.revision = next((line[len(REVISION) :] for line in lines if line.startswith(REVISION)), "")
        table = [tuple(line.split(",")) for line in lines if "," in line and not line.startswith(REVISION)]
        headings = table[-2] if len(table) > 1 and "transA" in table[-2] else ()
        if not table or (len(table[-1]) != OLD_COLUMNS and len(headings) != len(table[-1])):
            raise UsageError(f"{self.program} has written a HIPBLASLT_TUNING_FILE of a format that is not known here")
        return Row(headings, table[-1])

    def default(self, gemm: Gemm, candidates: Sequence[Candidate], answer: Answer) -> Candidate | None:
        """The kernel that hipBLASLt has run without a file; where the benchmark lacks it, its own first choice."""
        ran = used(answer.log).get(problem(gemm), set())
        first = candidates[0] if candidates else None
        return next((kernel for kernel in candidates if kernel.kernel in ran), first)

    def applied(self, gemm: Gemm, candidate: Candidate, answer: Answer) -> str:
        """Why this kernel was not what ran; "" where it was. Raises UsageError where the file can't have been read."""
        if answer.revision and answer.revision != self.revision:
            raise UsageError(
                f"{self.program} is of hipBLASLt {self.revision}, but training loads {answer.revision} "
                f"({answer.library}), which reads no file of another build: put that library's {PROGRAM} first on PATH"
            )
        ran = used(answer.log).get(problem(gemm), set())
        if not ran:
            return "hipBLASLt is not asked for this product"
        return "" if candidate.kernel in ran else f"hipBLASLt takes kernel {', '.join(sorted(ran))} all the same"

    def write(self, folder: Path, chosen: Mapping[str, Candidate], gpus: int) -> list[str]:
        """Write the override file for the kernels of these products; its name."""
        rows = [self._rows[key].of(kernel, self._details[key][kernel.kernel]) for key, kernel in chosen.items()]
        (folder / FILES[self.by]).write_text(f"{REVISION}{self.revision}\n{''.join(rows)}")
        return [FILES[self.by]]


def parse(printed: str) -> list[dict[str, str]]:
    """The kernels that the benchmark has printed before its "Winner", each with index, us, and its names."""
    found: list[dict[str, str]] = []
    headings: list[str] = []
    for line in printed.partition("Winner:")[0].splitlines():
        cells = line.strip().split(",")
        detail = re.match(r"\s*--(Solution index|Solution name|kernel name):\s*(.*)", line)
        if "transA" in line and len(cells) > 2:
            headings = [cells[0].partition(":")[2] or cells[0], *cells[1:]]
        elif headings and len(cells) == len(headings):
            found.append(dict(zip(headings, cells, strict=True)))
            headings = []
        elif detail and found and not headings:  # headings that are left are of a line that was not understood
            found[-1]["index" if detail[1] == "Solution index" else detail[1]] = detail[2].strip()
    return [one for one in found if one.get("index", "").isdigit() and _is_time(one.get("us", ""))]


def _is_time(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


def used(log: str) -> dict[str, set[str]]:
    """Product (`problem`) → indices of the kernels that hipBLASLt has run for it, of what it logs with mask 32."""
    found: dict[str, set[str]] = {}
    for line in log.splitlines():
        words = line.split()
        said = {name: value for name, value in zip(words, words[1:], strict=False) if name.startswith("-")}
        if PROGRAM in words and "--solution_index" in said:
            found.setdefault(" ".join(said.get(name, "") for name in KEY), set()).add(said["--solution_index"])
    return found


def problem(gemm: Gemm) -> str:
    """A product as `used` names it."""
    return f"{gemm.layout[0]} {gemm.layout[1]} {gemm.m} {gemm.n} {gemm.k} {TYPES[gemm.dtype]} {TYPES[gemm.out]}"
