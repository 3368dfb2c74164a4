"""`megatron-rocm doctor`: every check, and what they say about training here."""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import NoReturn

from megatron_rocm import __version__
from megatron_rocm.config.request import Said, read
from megatron_rocm.doctor import container, devices, health, host, measure, nics, storage, versions
from megatron_rocm.doctor.finding import Finding, Report, fine, problem, text, verdict, warning
from megatron_rocm.doctor.measure import Measured
from megatron_rocm.doctor.patient import Patient, here
from megatron_rocm.errors import UsageError
from megatron_rocm.launch import preflight
from megatron_rocm.launch.train import FAMILIES
from megatron_rocm.platform.settings import LIBRARY_PREFIXES
from megatron_rocm.resolve import Resolution, resolve

HELP = f"""megatron-rocm doctor [--json] [--network] [--gemm] [--family {"|".join(FAMILIES)}]
                     [KEY=VALUE …] [FILE.yaml …]

Looks at this machine and says what training would find: the machine and its tier, versions and whether they fit each
other, GPUs and their health, network, shared memory, limits, disks, partitions, masks, container flags and kernel
settings, each with the command that mends it. KEY=VALUE are those of `megatron-rocm train`: your run.

  --json      the report as JSON
  --network   all-reduce over all processes of the run, with the bandwidth of each size; the same command on every node:
              megatron-rocm doctor --network NNODES=2 NODE_RANK=0|1 MASTER_ADDR=…
  --gemm      TFLOP/s of each matrix product of the configured model on one GPU: QKV, projection, MLP, output layer, in
              the forward pass and for both gradients
  --family {"|".join(FAMILIES)}  whose sizes MODEL_SIZE names [llama3]

Exit status: 0 training can start, 1 it can't (warnings don't count), 2 a mistake in the command."""


def _run(patient: Patient) -> Iterator[Finding]:
    """Whether the run that was asked for can be made at all."""
    refused, run = patient.refused, patient.run
    if run:
        try:
            preflight.checkpoint(run)
        except UsageError as error:
            refused = str(error)
        except OSError as error:
            refused = f"{error.filename}: {error.strerror}"
    if run and not refused:
        nodes, processes = run.parallel.nnodes, run.parallel.gpus_per_node
        where = f"{nodes} node{'s' * (nodes > 1)} of {processes} process{'es' * (processes > 1)}"
        yield fine("run", f"{run.model.title} in {run.precision.dtype} on {where}")
    elif not run and "MODEL_SIZE" not in patient.request.said and _smaller_would_do(patient):
        yield warning(
            "run", refused, "this is what is trained where MODEL_SIZE is not said", "MODEL_SIZE=tiny fits here"
        )
    else:
        yield problem("run", refused, "`megatron-rocm train` refuses it with these words")


def _smaller_would_do(patient: Patient) -> bool:
    """Whether the same request for the smallest model passes."""
    tiny = {**patient.request.said, "MODEL_SIZE": Said("tiny", "tiny", "doctor")}
    try:
        resolve(replace(patient.request, said=tiny), patient.machine, dict(patient.environment), dry_run=True)
    except UsageError:
        return False
    return True


CONCERNS: tuple[tuple[str, Callable[[Patient], Iterator[Finding]]], ...] = (
    ("machine", devices.checks),
    ("run", _run),
    ("versions", versions.checks),
    ("health", health.checks),
    ("network", nics.checks),
    ("process", container.checks),
    ("disk", storage.checks),
    ("kernel", host.checks),
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"doctor: {message}; `megatron-rocm doctor --help` shows the usage")


def main(arguments: Sequence[str]) -> int:
    """Look and report: 0 where training can start, else 1."""
    if "--help" in arguments or "-h" in arguments:
        print(HELP)
        return 0
    parser = _Parser(prog="megatron-rocm doctor", add_help=False, allow_abbrev=False)
    for option in ("--json", "--network", "--gemm"):
        parser.add_argument(option, action="store_true")
    parser.add_argument("--family", choices=FAMILIES, default="llama3")
    parser.add_argument("words", nargs="*")
    options = parser.parse_intermixed_args(list(arguments))
    patient = here(read(options.family, options.words, os.environ, LIBRARY_PREFIXES), os.environ)
    report = examined(patient, network=options.network, gemm=options.gemm)
    print(report.model_dump_json(indent=1) if options.json else "\n".join(lines(report)))
    return 0 if report.can_train else 1


def examined(patient: Patient, *, network: bool = False, gemm: bool = False) -> Report:
    """All findings about a patient, and the figures that were asked for. Raises UsageError where these can't be had."""
    asked = {}
    if network:
        asked["network"] = measure.network, measure.several(patient)
    if gemm:
        asked["gemm"] = measure.gemm, measure.one_gpu(patient)
    findings = [
        finding.model_copy(update={"concern": concern})
        for concern, checks in CONCERNS
        for finding in _held(checks, patient)
    ]
    rows = {}
    torchless = any(finding.check == "torch" and finding.status == "problem" for finding in findings)
    for name, (measured_by, resolution) in asked.items():
        measured = _unmeasured(name) if torchless else _measured(name, measured_by, resolution)
        findings.append(measured.finding.model_copy(update={"concern": "measured"}))
        rows[name] = measured.rows
    return Report(
        version=__version__,
        host=socket.gethostname(),
        can_train=all(finding.status != "problem" for finding in findings),
        machine=asdict(patient.machine),
        findings=tuple(findings),
        **rows,  # type: ignore[arg-type]
    )


def _unmeasured(option: str) -> Measured:
    return Measured(warning(f"--{option}", "not measured", "torch would do it, and torch has a problem here"))


def _measured(option: str, measured_by: Callable[[Resolution], Measured], resolution: Resolution) -> Measured:
    try:
        return measured_by(resolution)
    except OSError as error:  # a disk that is full, or a container that may not write
        return Measured(
            problem(
                f"--{option}", f"{error.filename or 'temporary files'}: {error.strerror or error}",
                "its processes need a temporary folder", "TMPDIR=<a folder you can write to>",
            )
        )  # fmt: skip


def _held(checks: Callable[[Patient], Iterator[Finding]], patient: Patient) -> Iterator[Finding]:
    """The findings; a library that a check itself needs and lacks is one."""
    try:
        yield from checks(patient)
    except ImportError as error:
        yield problem("this check", str(error), "it can't be made, nor can a run", "pip install megatron-rocm anew")


def lines(report: Report) -> list[str]:
    """The report for people."""
    told = [f"megatron-rocm {report.version} on {report.host}", "", *text(report.findings)]
    if report.network:
        told += ["", "all-reduce", *measure.network_table(report.network)]
    if report.gemm:
        told += ["", "matrix products", *measure.gemm_table(report.gemm)]
    return [*told, "", verdict(report.findings)]
