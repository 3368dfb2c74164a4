"""The file that `tune` writes and GEMM_TUNING names: what was chosen, for which products, on what. Imports no torch.

It is JSON; beside it lies what the library itself reads, in the library's own format.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

from megatron_rocm.config.schema import RunConfig
from megatron_rocm.errors import UsageError
from megatron_rocm.platform.machine import Machine
from megatron_rocm.tune.shapes import gemms
from megatron_rocm.tune.versions import ARCHITECTURE, changes, digest, stamp

By = Literal["hipblaslt", "tunableop"]
Kind = Literal["0", "1", "hipblaslt", "tunableop"]

SWITCHES: dict[str, Kind] = {"0": "0", "1": "1"}
# What the library reads; torch puts the number of the process's GPU in place of %d.
FILES: dict[By, str] = {"hipblaslt": "hipblaslt.txt", "tunableop": "tunableop%d.csv"}
# Variables that would choose other kernels than the file does.
RIVALS = (
    "HIPBLASLT_TUNING_OVERRIDE_FILE", "HIPBLASLT_TUNING_FILE", "HIPBLASLT_TUNING_MODE", "HIPBLASLT_TUNING_CACHE_PATH",
    "TE_HIPBLASLT_ALGO_LOAD", "TE_HIPBLASLT_ALGO_SELECTION", "TE_HIPBLASLT_TUNING_RUN_COUNT",
    "PYTORCH_TUNABLEOP_ENABLED", "PYTORCH_TUNABLEOP_TUNING", "PYTORCH_TUNABLEOP_FILENAME",
)  # fmt: skip
SHOWN = 3  # products named in a message


@dataclass(frozen=True)
class Candidate:
    """A kernel for one product, by the library's own word for it. `us` is its time in microseconds, 0 if unknown."""

    kernel: str
    us: float
    name: str = ""


@dataclass(frozen=True)
class Refused:
    """A kernel that was not taken, and why."""

    kernel: str
    us: float
    why: str


@dataclass(frozen=True)
class Product:
    """What became of one product. `kernel` None leaves the choice to the library, and `why` says for what reason."""

    key: str
    names: tuple[str, ...]
    count: int
    default_us: float = 0.0
    kernel: Candidate | None = None
    why: str = ""
    refused: tuple[Refused, ...] = ()


@dataclass(frozen=True)
class Tuned:
    """All of it. `library` is the file of hipBLASLt that was used, `files` the digests of what the library reads."""

    by: By
    title: str
    made: str
    stamp: Mapping[str, str]
    library: str
    products: tuple[Product, ...]
    files: Mapping[str, str] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write as JSON, whole or not at all."""
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(asdict(self), indent=1) + "\n")
        temporary.replace(path)


def load(path: str | Path) -> Tuned:
    """Read what `save` wrote. Raises UsageError for what is no such file."""
    try:
        return TypeAdapter(Tuned).validate_json(Path(path).read_bytes())
    except OSError as error:
        raise UsageError(
            f"GEMM_TUNING={path}: {error.strerror}; give 0, 1, or a file of `megatron-rocm tune`"
        ) from None
    except ValueError:
        raise UsageError(f"GEMM_TUNING={path}: not a file of `megatron-rocm tune`; give 0, 1, or such a file") from None


def kind(value: str) -> Kind:
    """A value of GEMM_TUNING, or who reads its file. Raises UsageError for a file that is none."""
    return SWITCHES.get(value) or _by(value)


@functools.lru_cache
def _by(path: str) -> By:
    return load(path).by


def library_files(by: By, gpus: int) -> list[str]:
    """The names of the files that the processes of a node with so many GPUs read."""
    return list(dict.fromkeys(FILES[by].replace("%d", str(number)) for number in range(gpus)))


def library_file(value: str) -> str:
    """The absolute path of what the library reads, for a GEMM_TUNING that is a file."""
    return str(Path(value).resolve().parent / FILES[_by(value)])


def check(run: RunConfig, machine: Machine, said: Mapping[str, str], root: Path = Path("/")) -> None:
    """Raise UsageError where GEMM_TUNING is a file that does not fit this run and machine, with what changed.

    Of a TARGET only the architecture is known: the rest is compared where the run starts. `said` is the user's own
    environment and exports.
    """
    value = run.launch.gemm_tuning
    if value in SWITCHES:
        return
    if rival := rival_of(said):
        raise UsageError(
            f"GEMM_TUNING={value} with {rival}={said[rival]}: both choose kernels; unset {rival}, or give GEMM_TUNING=0"
        )
    tuned = load(value)
    names = library_files(tuned.by, run.parallel.gpus_per_node)
    found = _machine_changes(tuned, machine, root) + _file_changes(Path(value), tuned, names)
    found += _shape_changes(tuned, run)
    if found:
        raise UsageError(
            f"GEMM_TUNING={value} does not fit: {'; '.join(found)}. Tune again with `megatron-rocm tune` and the words "
            "of this run, or set GEMM_TUNING=1"
        )


def rival_of(said: Mapping[str, str]) -> str:
    """The first of RIVALS that is set to something; "" for none."""
    return next((name for name in RIVALS if said.get(name, "0") not in ("", "0")), "")


def _machine_changes(tuned: Tuned, machine: Machine, root: Path) -> list[str]:
    if machine.is_here and machine.vendor != "cpu":
        return changes(tuned.stamp, stamp(machine, tuned.library, root))
    return changes({ARCHITECTURE: tuned.stamp.get(ARCHITECTURE, "")}, {ARCHITECTURE: machine.arch})


def _file_changes(path: Path, tuned: Tuned, names: Iterable[str]) -> list[str]:
    """What the library reads, `names`, must be what was judged."""
    then = {f"{path.parent / name}": tuned.files.get(name, "not made") for name in names}
    return changes(then, {file: digest(Path(file)) for file in then})


def _shape_changes(tuned: Tuned, run: RunConfig) -> list[str]:
    known = {product.key for product in tuned.products}
    wanted = {gemm.key: f"{gemm.name} {gemm.phase} {gemm.key}" for gemm in gemms(run)}
    missing = [text for key, text in wanted.items() if key not in known]
    if not missing:
        return []
    more = "" if len(missing) <= SHOWN else f" and {len(missing) - SHOWN} more"
    return [f"the shapes changed: {len(missing)} of {len(wanted)} are not in it ({', '.join(missing[:SHOWN])}{more})"]


def digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """File name → its digest, of what the library reads."""
    return {name: digest(folder / name) for name in names}
