"""`megatron-rocm doctor` as people call it: real processes, on this machine."""

import contextlib
import errno
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hosts import two_hosts, why_not
from machines import write
from support import ROOT, environment, free_port

from megatron_rocm.cli import guarded, main
from megatron_rocm.doctor import measure
from megatron_rocm.doctor.bandwidth import LARGEST
from megatron_rocm.doctor.finding import Report
from megatron_rocm.doctor.patient import probe
from megatron_rocm.errors import UsageError
from megatron_rocm.platform.machine import detect

ON_CPU = pytest.mark.skipif(detect().vendor != "cpu", reason="looks at a machine without a GPU")


def start(folder: Path, *words: str, enter: Sequence[str] = (), **more: str) -> subprocess.Popen[str]:
    """`megatron-rocm doctor` in a folder of its own, after the words that enter a host."""
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [*enter, sys.executable, "-m", "megatron_rocm.cli", "doctor", *words],
        cwd=folder, env=environment(**more), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def ended(process: subprocess.Popen[str], status: int) -> tuple[str, str]:
    """Its stdout and stderr; fails unless it ends with `status`."""
    out, err = process.communicate(timeout=150)
    assert process.returncode == status, out + err
    return out, err


@ON_CPU
def test_the_report_as_json_with_the_products_of_tiny(tmp_path: Path) -> None:
    out, _ = ended(start(tmp_path / "here", "--json", "--gemm", "MODEL_SIZE=tiny"), 0)
    report = Report.model_validate_json(out)
    assert report.can_train and report.machine["vendor"] == "cpu"
    torch = next(finding for finding in report.findings if finding.check == "torch")
    assert torch.status == "ok" and "built for the CPU" in torch.found
    rows = {(row["name"], row["phase"]): row for row in report.gemm}
    assert len(rows) == len(report.gemm) == 15
    assert {name for name, _ in rows} == {"qkv", "proj", "fc1", "fc2", "head"}
    for row in rows.values():
        work = 2 * row["m"] * row["n"] * row["k"]
        assert row["tflops"] == pytest.approx(work / row["seconds"] / 1e12) and row["count"] > 0
    assert not list((tmp_path / "here").iterdir())  # nothing is left behind


@ON_CPU
def test_two_nodes_measure_their_network(tmp_path: Path) -> None:
    """As hosts of their own where this user may make such: over the one interface that leads to the other."""
    words = ("--network", "--json", "MODEL_SIZE=tiny", "NNODES=2", f"MASTER_PORT={free_port()}", "RDZV_TIMEOUT=100")
    with contextlib.ExitStack() as stack:
        hosts = None if why_not() else stack.enter_context(two_hosts(tmp_path))
        enter = [host.command() for host in hosts] if hosts else [[], []]
        master = "MASTER_ADDR=master" if hosts else "MASTER_ADDR=localhost"
        nodes = [start(tmp_path / str(n), *words, master, f"NODE_RANK={n}", enter=enter[n]) for n in range(2)]
        try:
            first, second = (Report.model_validate_json(ended(node, 0)[0]) for node in nodes)
            came = [host.received("eth1") for host in hosts or ()]
        finally:
            for node in nodes:
                node.kill()
                node.wait()
    assert not second.network and [row["bytes"] for row in first.network] == [4**power for power in range(5, 14)]
    for row in first.network:
        assert row["right"] and row["algorithm"] == pytest.approx(row["bytes"] / row["seconds"])
        assert row["bus"] == pytest.approx(row["algorithm"])  # 2 (n-1)/n is 1 for two
    assert all(size > LARGEST["cpu"] for size in came)
    if hosts:
        chosen = {finding.check: finding.found for finding in second.findings}["GLOO_SOCKET_IFNAME"]
        assert chosen.startswith("eth1: ")


@ON_CPU
def test_a_node_that_is_alone_says_so_in_time(tmp_path: Path) -> None:
    words = (
        "--network",
        "MODEL_SIZE=tiny",
        "NNODES=2",
        "NODE_RANK=1",
        "MASTER_ADDR=localhost",
        f"MASTER_PORT={free_port()}",
    )
    out, _ = ended(start(tmp_path / "1", *words, "RDZV_TIMEOUT=5"), 1)
    assert "problem" in out and "all-reduce" in out and "MASTER_ADDR" in out
    assert out.splitlines()[-1].startswith("training can't start here")


def test_bandwidth() -> None:
    row = measure.with_bandwidth({"bytes": 8 * 10**9, "seconds": 2.0, "right": True}, 8)
    assert row["algorithm"] == 4e9 and row["bus"] == pytest.approx(7e9)


def test_tables() -> None:
    lines = measure.network_table([measure.with_bandwidth({"bytes": 2**20, "seconds": 1e-3, "right": True}, 2)])
    assert lines[1].split() == ["1", "MiB", "1000.0", "1.049", "1.049"]
    row = {"name": "fc1", "phase": "wgrad", "m": 64, "n": 32, "k": 16, "dtype": "bf16", "count": 3}
    lines = measure.gemm_table(
        [measure.with_speed({**row, "seconds": None}), measure.with_speed({**row, "seconds": 1e-3})]
    )
    assert "too long here" in lines[1] and lines[2].split()[-1] == "6.55e-05"


AMDSMI = """
class Handle: pass
def amdsmi_init(): pass
def amdsmi_shut_down(): pass
def amdsmi_get_processor_handles(): return [Handle(), Handle()]
def amdsmi_get_gpu_device_bdf(handle): return "0000:05:00.0"
def amdsmi_get_gpu_total_ecc_count(handle):
    return {"correctable_count": 7, "uncorrectable_count": 1, "deferred_count": 0}
def amdsmi_get_violation_status(handle):
    return {"acc_counter": 9, "active_ppt_pwr": True, "active_hbm_thrm": True, "active_vr_thrm": "N/A"}
def amdsmi_get_gpu_bad_page_info(handle):
    return [{"value": 0, "page_address": "0x0", "page_size": "0x1000", "status": 1}]
def amdsmi_get_gpu_vram_usage(handle): return {"vram_total": 196592, "vram_used": 284}
def amdsmi_gpu_xgmi_error_status(handle): raise RuntimeError("not supported")
"""  # as in ROCm/amdsmi py-interface/amdsmi_interface.py

PYNVML = """
class Memory: used = 2**28
def nvmlInit(): pass
def nvmlShutdown(): pass
def nvmlDeviceGetCount(): return 1
def nvmlDeviceGetHandleByIndex(index): return index
def nvmlDeviceGetUUID(handle): return "GPU-0a"
def nvmlDeviceGetRemappedRows(handle): return (0, 1, 1, 0)
def nvmlDeviceGetCurrentClocksThrottleReasons(handle): return 0x04 | 0x40
def nvmlDeviceGetMemoryInfo(handle): return Memory()
def nvmlDeviceGetTotalEccErrors(handle, kind, counter): raise RuntimeError("Not Supported")
def nvmlDeviceGetNvLinkState(handle, link):
    if link > 11:
        raise RuntimeError("Invalid Argument")
    return int(link != 3)
"""  # as in nvidia-ml-py's pynvml.py


AMD_TOLD = {
    "uncorrectable": 1, "retired": [1], "throttled": ["hbm_thrm", "ppt_pwr"], "link_errors": None, "used": 284 * 2**20,
}  # fmt: skip
NVIDIA_TOLD = {
    "uncorrectable": None, "remap_pending": True, "remap_failed": False, "throttled": ["hardware thermal"],
    "links_down": 1, "links": 11, "used": 2**28,
}  # fmt: skip


@pytest.mark.parametrize(
    ("vendor", "library", "source", "expected"),
    [("amd", "amdsmi", AMDSMI, AMD_TOLD), ("nvidia", "pynvml", PYNVML, NVIDIA_TOLD)],
)
def test_health_is_asked_of_the_vendors_library(
    tmp_path: Path, vendor: str, library: str, source: str, expected: dict[str, object]
) -> None:
    write(tmp_path, {f"{library}.py": source})
    gpu = probe(vendor, environment(PYTHONPATH=str(tmp_path)))["gpus"][0]
    assert {name: gpu[name] for name in expected} == expected
    write(tmp_path, {f"{library}.py": "raise OSError('libdrm.so: cannot open shared object file')"})
    assert "cannot open shared object" in probe(vendor, environment(PYTHONPATH=str(tmp_path)))["error"]
    write(tmp_path, {f"{library}.py": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"})
    assert "signal 11" in probe(vendor, environment(PYTHONPATH=str(tmp_path)))["error"]


def test_transformer_engine_is_asked_by_symbol(tmp_path: Path) -> None:
    write(
        tmp_path,
        {"transformer_engine/__init__.py": "__version__ = '2.12.0'", "transformer_engine/pytorch/__init__.py": ""},
    )
    told = probe("transformer_engine", environment(PYTHONPATH=str(tmp_path)))
    assert any("pytorch.Linear" in line for line in told["vital"]) and told["missing"]
    assert not set(told["vital"]) & set(told["missing"])


def test_a_library_that_is_not_there_is_told_from_a_broken_one(tmp_path: Path) -> None:
    write(tmp_path, {"torch.py": "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')"})
    assert probe("torch", environment(PYTHONPATH=str(tmp_path)))["absent"]
    write(tmp_path, {"torch.py": "import a_missing_dependency"})
    told = probe("torch", environment(PYTHONPATH=str(tmp_path)))
    assert "a_missing_dependency" in told["error"] and not told["absent"]


@ON_CPU
def test_without_torch_the_command_still_reports(tmp_path: Path) -> None:
    write(tmp_path / "site", {"torch.py": "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')"})
    out, _ = ended(start(tmp_path / "here", PYTHONPATH=f"{ROOT}:{tmp_path / 'site'}"), 1)
    assert "torch" in out and "not installed" in out and "open files" in out


def test_a_library_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given up after a while, and its process ends with the one that asked."""
    write(tmp_path, {"torch.py": "import os, sys, time\nos.write(2, b'here\\n')\ntime.sleep(600)"})
    monkeypatch.setattr("megatron_rocm.doctor.patient.PROBE_SECONDS", 2)
    assert probe("torch", environment(PYTHONPATH=str(tmp_path))) == {"error": "no answer within 2 seconds"}
    write(tmp_path, {"torch.py": f"import os, time\nos.mkfifo({str(tmp_path / 'fifo')!r})\ntime.sleep(600)"})
    code = "import os; from megatron_rocm.doctor.patient import probe; probe('torch', os.environ)"
    asking = subprocess.Popen([sys.executable, "-c", code], env=environment(PYTHONPATH=f"{ROOT}:{tmp_path}"))
    try:
        until((tmp_path / "fifo").exists)
        (asked,) = Path(f"/proc/{asking.pid}/task/{asking.pid}/children").read_text().split()
    finally:
        asking.kill()
        asking.wait()
    until(lambda: not alive(asked))


def until(holds: Callable[[], bool]) -> None:
    """Wait for it; fails after a minute."""
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize("how", ["PYTHONIOENCODING=ascii", "PYTHONIOENCODING=utf-8 >&-"])
def test_an_output_that_can_not_take_it(how: str) -> None:
    words = f'exec env "$0" -m megatron_rocm.cli doctor --help {how.partition(" ")[2]}'
    code = f"export {how.partition(' ')[0]}; {words}"
    done = subprocess.run(
        ["sh", "-c", code, sys.executable], env=environment(), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_file_that_is_closed_to_this_user(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse() -> int:
        raise PermissionError(errno.EACCES, "Permission denied", "/data/tokenizer")

    assert guarded(refuse) == 2
    assert capsys.readouterr().err == "megatron-rocm: /data/tokenizer: Permission denied\n"


@pytest.mark.parametrize("key", ["DATA_PATH", "TOKENIZER_MODEL"])
def test_a_name_that_no_file_can_have(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--family", "llama3", "MODEL_SIZE=tiny", "TARGET=cpu", f"{key}=/tmp/{'a' * 300}"]) == 2
    assert "File name too long" in capsys.readouterr().err


def test_an_output_on_a_full_disk() -> None:
    done = subprocess.run(
        ["sh", "-c", 'exec "$0" -m megatron_rocm.cli doctor --help >/dev/full', sys.executable],
        env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (2, "megatron-rocm: the output: No space left on device\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--jsn"], "--jsn"),
        (["MODEL_SIZ=8"], "MODEL_SIZE"),
        (["TARGET=mi300x"], "TARGET=mi300x"),
        (["--network", "MODEL_SIZE=tiny", "TARGET=cpu"], "NNODES=2"),
    ],
)
def test_mistakes_are_usage_errors(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *words]) == 2
    assert said in capsys.readouterr().err


def test_gemm_of_a_run_that_can_not_be_made(tmp_path: Path) -> None:
    from machines import KINDS, patient

    with pytest.raises(UsageError, match="--gemm needs a run that can be made"):
        measure.one_gpu(patient(tmp_path, KINDS["none"], "MODEL_SIZE=tiny", "TP=3"))


def test_gemm_of_a_model_that_does_not_fit_takes_one_layer(tmp_path: Path) -> None:
    from machines import KINDS, patient

    here = patient(tmp_path, KINDS["h100"], "MODEL_SIZE=70", devices=1)
    assert "can't fit" in here.refused
    assert measure.one_gpu(here).config.model.num_layers == 1


def test_the_command_itself_imports_no_torch() -> None:
    code = "import sys, megatron_rocm.doctor.command; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment(), check=False).returncode == 0


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--help"]) == 0
    out = capsys.readouterr().out
    assert all(option in out for option in ("--json", "--network", "--gemm", "--family"))


def test_the_schema_says_what_each_field_is() -> None:
    schema = Report.model_json_schema()
    assert set(schema["required"]) == {"version", "host", "can_train", "machine", "findings"}
    assert json.dumps(schema)
