"""What doctor finds on machines of each kind, in order and out of it."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from machines import GIB, KINDS, patient, probes, tree, write

from megatron_rocm.doctor import command, container, devices, health, host, storage, versions
from megatron_rocm.doctor.finding import Finding
from megatron_rocm.doctor.patient import UNLIMITED
from megatron_rocm.doctor.versions import has_kernels, known_to_fit

AMD = [name for name, kind in KINDS.items() if kind.vendor == "amd"]
NVIDIA = [name for name, kind in KINDS.items() if kind.vendor == "nvidia"]
GPUS = AMD + NVIDIA


def found(findings, check: str) -> Finding:
    """The finding of that name."""
    by_name = {finding.check: finding for finding in findings}
    assert check in by_name, list(by_name)
    return by_name[check]


def wrong(findings) -> dict[str, Finding]:
    """What is not ok, by name."""
    return {finding.check: finding for finding in findings if finding.status != "ok"}


@pytest.mark.parametrize("name", KINDS)
def test_a_machine_in_order(tmp_path: Path, name: str) -> None:
    kind = KINDS[name]
    here = patient(tmp_path, kind, "MODEL_SIZE=tiny", "TP=1")
    for checks in (devices, versions, health, container, host):
        bad = wrong(checks.checks(here))
        bad.pop("tier", None)  # Transformer Engine is not installed where tests run
        bad.pop("transformers", None)
        assert not bad, bad
    machine = found(devices.checks(here), "machine").found
    if name == "none":
        assert "no GPU" in machine and "torch only" in found(devices.checks(here), "tier").found
    else:
        name = {"mi250x": "AMD aldebaran", "mi300x": "AMD Instinct MI300X OAM", "mi355x": "AMD gfx950"}.get(
            name, kind.name
        )
        assert f"8 × {name} with" in machine and kind.arch in machine
        assert f"{kind.device_memory / GIB:.1f} GiB" in machine
        assert kind.toolkit in found(versions.checks(here), "torch").found
        assert kind.driver in found(versions.checks(here), "driver").found


@pytest.mark.parametrize("name", GPUS)
def test_the_tier_and_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    kind = KINDS[name]
    without = found(devices.checks(patient(tmp_path, kind, "MODEL_SIZE=tiny", "TP=1")), "tier")
    write(tmp_path / "site", {"transformer_engine/__init__.py": ""})
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.defpath}"}
    tier = found(devices.checks(patient(tmp_path, kind, "MODEL_SIZE=tiny", environment=environment)), "tier")
    if name == "mi250x":
        assert "gfx90a" in without.found and "gfx90a" in tier.found
    else:
        assert without.status == "warning" and "not installed" in without.found
        assert ("Dockerfile.rocm" if kind.vendor == "amd" else "pip install") in without.mend
        assert tier.status == "ok" and tier.found.startswith("Transformer Engine")


@pytest.mark.parametrize("name", GPUS)
@pytest.mark.parametrize("in_container", [False, True])
def test_gpus_that_are_there_but_closed(tmp_path: Path, name: str, in_container: bool) -> None:
    """As in a container without the vendor's flags: the PCI bus shows them, nothing else does."""
    kind = KINDS[name]
    tree(tmp_path / "host", kind)
    root = tmp_path / "here"
    environment = tree(root, KINDS["none"])
    (root / "sys/bus").mkdir(parents=True)
    (tmp_path / "host/sys/bus/pci").rename(root / "sys/bus/pci")
    if in_container:
        write(root, {"run/.containerenv": ""})
    here = patient(root, KINDS["none"], environment=environment)
    closed = found(devices.checks(here), "unused GPUs")
    flags = "--device /dev/kfd" if kind.vendor == "amd" else "--gpus all"
    assert closed.status == "problem" and "8" in closed.found and (flags in closed.mend) == in_container
    assert "unused GPUs" not in wrong(
        devices.checks(patient(root, KINDS["none"], "TARGET=cpu", environment=environment))
    )


@pytest.mark.parametrize(
    ("name", "mask", "status", "left"),
    [
        ("mi300x", {"HIP_VISIBLE_DEVICES": "0,1"}, "warning", "2 of 8"),
        ("mi300x", {"ROCR_VISIBLE_DEVICES": "-1"}, "problem", "none of 8"),
        ("h100", {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, "ok", "all 8"),
        ("h100", {"CUDA_VISIBLE_DEVICES": ""}, "problem", "none of 8"),
    ],
)
def test_masks(tmp_path: Path, name: str, mask: dict[str, str], status: str, left: str) -> None:
    finding = found(devices.checks(patient(tmp_path, KINDS[name], said=mask)), "masks")
    assert finding.status == status and left in finding.found
    assert status == "ok" or next(iter(mask)) in finding.mend


@pytest.mark.parametrize("modes", [("CPX", "NPS4"), ("SPX", "NPS4"), ("CPX", "NPS1")])
def test_partition_modes(tmp_path: Path, modes: tuple[str, str]) -> None:
    kind = replace(KINDS["mi300x"], simds=152, device_memory=24 * GIB)
    environment = tree(tmp_path, kind, 64)
    card = "sys/class/drm/card1/device/current"
    write(tmp_path, {f"{card}_compute_partition": modes[0], f"{card}_memory_partition": modes[1]})
    finding = found(devices.checks(patient(tmp_path, kind, environment=environment)), "partitions")
    assert finding.status == "warning" and modes[0] in finding.found and modes[1] in finding.found
    assert "amd-smi set" in finding.mend


def test_a_link_that_is_gone(tmp_path: Path) -> None:
    environment = tree(tmp_path, KINDS["mi355x"])
    link = next((tmp_path / "sys/class/kfd").rglob("io_links/1"))
    (link / "properties").unlink()
    finding = found(devices.checks(patient(tmp_path, KINDS["mi355x"], environment=environment)), "links")
    assert finding.status == "warning" and "27 of 28" in finding.found


@pytest.mark.parametrize("in_container", [False, True])
@pytest.mark.parametrize(
    ("name", "device"), [("mi300x", "dev/kfd"), ("mi300x", "dev/dri/renderD130"), ("b200", "dev/nvidia-uvm")]
)
def test_a_device_that_is_missing_or_closed(tmp_path: Path, name: str, device: str, in_container: bool) -> None:
    environment = tree(tmp_path, KINDS[name])
    if in_container:
        write(tmp_path, {".dockerenv": ""})
    here = patient(tmp_path, KINDS[name], environment=environment)
    closed = replace(here, opens=lambda path: path != tmp_path / device, groups=frozenset())
    shut = found(container.checks(closed), "GPU devices")
    assert shut.status == "problem" and f"/{device}" in shut.found
    assert ("--group-add" if in_container else "usermod") in shut.mend
    (tmp_path / device).unlink()
    absent = found(container.checks(here), "GPU devices")
    assert f"/{device}" in absent.found
    assert absent.status == ("problem" if in_container or name == "mi300x" else "warning")
    flag = {"mi300x": "--device /dev/" + device.split("/")[1], "b200": "--gpus all"}[name]
    assert (flag in absent.mend) == in_container


def test_shared_memory_limits_and_system_calls(tmp_path: Path) -> None:
    environment = tree(tmp_path, KINDS["mi300x"])
    write(tmp_path, {
        ".dockerenv": "", "proc/self/status": "Name:\tpython3\nSeccomp:\t2",
        "sys/class/infiniband/mlx5_0/ports/1/state": "4: ACTIVE",
    })  # fmt: skip
    here = patient(
        tmp_path, KINDS["mi300x"], environment=environment, shared_memory=64 * 2**20,
        limits={"memlock": 64 * 2**10, "nofile": 1024},
    )  # fmt: skip
    bad = wrong(container.checks(here))
    flags = {
        "shared memory": "--ipc host", "memlock": "--ulimit memlock=-1", "open files": "--ulimit nofile",
        "RDMA devices": "--device /dev/infiniband", "system calls": "seccomp=unconfined",
    }  # fmt: skip
    assert bad.keys() == flags.keys()
    for check, flag in flags.items():
        assert flag in bad[check].mend and bad[check].status == "warning"
    well = replace(here, shared_memory=64 * GIB, limits={"memlock": UNLIMITED, "nofile": UNLIMITED})
    assert wrong(container.checks(well)).keys() == {"RDMA devices", "system calls"}


@pytest.mark.parametrize(
    ("check", "file", "value", "command"),
    [
        ("numa_balancing", "proc/sys/kernel/numa_balancing", "1", "sysctl -w kernel.numa_balancing=0"),
        ("governor", "sys/devices/system/cpu/cpu1/cpufreq/scaling_governor", "schedutil", "cpupower frequency-set"),
        ("transparent_hugepage", "sys/kernel/mm/transparent_hugepage/enabled", "always madvise [never]", "echo always"),
        ("nmi_watchdog", "proc/sys/kernel/nmi_watchdog", "1", "sysctl -w kernel.nmi_watchdog=0"),
        ("idle state C2", "sys/devices/system/cpu/cpu3/cpuidle/state2/disable", "0", "cpupower idle-set -d 2"),
        ("iommu", "proc/cmdline", "ro quiet pci=realloc=off", "iommu=pt"),
        ("pci realloc", "proc/cmdline", "ro quiet iommu=pt", "pci=realloc=off"),
    ],
)
def test_a_host_tunable(tmp_path: Path, check: str, file: str, value: str, command: str) -> None:
    environment = tree(tmp_path, KINDS["mi300x"])
    write(tmp_path, {file: value})
    bad = wrong(host.checks(patient(tmp_path, KINDS["mi300x"], environment=environment)))
    assert bad.keys() == {check} and command in bad[check].mend and bad[check].why


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("mi300x", {"hip": None, "devices": 0}, "8 are to be used"),  # torch for the CPU
        ("h100", {"devices": 7}, "8 are to be used"),
        ("mi355x", {"architectures": ["gfx90a", "gfx942"]}, "none for gfx950"),
        ("b200", {"architectures": ["sm_80", "sm_90", "sm_90a"]}, "none for sm_100"),
        ("none", {"devices": 1}, "refuses to choose"),
    ],
)
def test_a_torch_that_does_not_fit(tmp_path: Path, name: str, change: dict[str, object], words: str) -> None:
    answers = probes(KINDS[name])
    answers["torch"].update(change)
    torch = found(versions.checks(patient(tmp_path, KINDS[name], answers=answers)), "torch")
    assert torch.status == "problem" and words in torch.why and torch.mend


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"error": "ModuleNotFoundError: No module named 'torch'", "absent": True}, "not installed"),
        ({"error": "the process ended with signal 11"}, "broken: the process ended with signal 11"),
    ],
)
@pytest.mark.parametrize("name", ["mi300x", "h100", "none"])
def test_without_torch_everything_else_is_still_told(
    tmp_path: Path, name: str, answer: dict[str, object], words: str
) -> None:
    here = patient(tmp_path, KINDS[name], "MODEL_SIZE=tiny", "TP=1", answers=probes(KINDS[name], torch=answer))
    report = command.examined(here)
    torch = found(report.findings, "torch")
    assert torch.status == "problem" and words in torch.found and not report.can_train
    assert {finding.concern for finding in report.findings} >= {
        "machine",
        "versions",
        "network",
        "process",
        "disk",
        "kernel",
    }


@pytest.mark.parametrize(
    ("arch", "built", "runs"),
    [
        ("gfx942", ["gfx90a:sramecc+:xnack-", "gfx942:sramecc+:xnack-"], True),
        ("gfx950", ["gfx942"], False),
        ("sm_86", ["sm_80"], True),
        ("sm_80", ["sm_86"], False),
        ("sm_90", ["sm_80"], False),
        ("sm_90", ["sm_80", "compute_80"], True),
        ("sm_90", ["sm_90a"], True),
        ("sm_103", ["sm_100a"], False),
        ("sm_103", ["sm_100f"], True),
        ("sm_120", ["sm_100"], False),
    ],
)
def test_kernels_for_an_architecture(arch: str, built: list[str], runs: bool) -> None:
    assert has_kernels(arch, built) == runs


@pytest.mark.parametrize(
    ("driver", "hip", "fits"),
    [
        ("6.10.5", "6.3.42131", True), ("6.10.5", "7.0.1", True), ("6.10.5", "7.1.0", False),
        ("6.16.13", "6.3.0", True), ("6.16.13", "6.1.2", False), ("7.99.0", "6.2.0", True), ("6.10.5", "10.0.1", True),
    ],
)  # fmt: skip
def test_driver_and_rocm(driver: str, hip: str, fits: bool) -> None:
    assert known_to_fit(driver, hip) == fits


def test_a_driver_too_old_for_cuda(tmp_path: Path) -> None:
    answers = probes(KINDS["h100"])
    answers["torch"].update(cuda="13.0", devices=0)
    here = patient(tmp_path, KINDS["h100"], answers=answers)
    driver = found(versions.checks(here), "driver")
    assert driver.status == "problem" and "550.54.15" in driver.found and "580" in driver.found
    answers["torch"].update(devices=8)  # with NVIDIA's forward compatibility package
    assert found(versions.checks(here), "driver").status == "ok"


@pytest.mark.parametrize(
    ("installed", "bad"),
    [
        ({"megatron-core": "0.16.1", "transformers": "4.51.0", "flash-attn": "2.8.3"}, set()),
        (
            {"megatron-core": "0.17.0", "transformers": "4.50.3", "flash-attn": "2.6.3"},
            {"megatron-core", "transformers", "flash-attn"},
        ),
        ({"megatron-core": "0.16.0", "transformers": "", "flash-attn": ""}, {"megatron-core", "transformers"}),
    ],
)
def test_versions_that_fit(tmp_path: Path, installed: dict[str, str], bad: set[str]) -> None:
    here = replace(patient(tmp_path, KINDS["mi300x"], "MODEL_SIZE=tiny", "TP=1"), installed=installed.__getitem__)
    told = wrong(versions.checks(here))
    assert told.keys() == bad and all(finding.status == "warning" for finding in told.values())


@pytest.mark.parametrize(
    ("name", "answer", "status"),
    [
        ("mi300x", {"vital": [], "missing": []}, "ok"),
        ("mi300x", {"vital": [], "missing": ["pytorch.fused_rope is missing"]}, "warning"),
        ("h100", {"vital": ["pytorch.Linear is missing"], "missing": []}, "problem"),
        ("b200", {"error": "ImportError: undefined symbol"}, "problem"),
        ("mi250x", {"error": "ImportError: undefined symbol"}, "warning"),  # it trains without
    ],
)
def test_transformer_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, answer: dict[str, object], status: str
) -> None:
    write(tmp_path / "site", {"transformer_engine/__init__.py": ""})
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    answers = probes(KINDS[name], transformer_engine=answer)
    engine = found(versions.checks(patient(tmp_path, KINDS[name], answers=answers)), "Transformer Engine")
    assert engine.status == status and bool(engine.mend) == (status != "ok")


def test_bounds_are_those_of_the_package() -> None:
    import re

    from support import ROOT

    text = (ROOT / "pyproject.toml").read_text()
    for name, (least, most) in {**versions.BOUNDS, "torch": versions.TORCH}.items():
        said = re.search(rf'"{name}>=([\d.]+)(?:,<([\d.]+))?"', text)
        assert said and (said[1], said[2]) == (least, most), name


@pytest.mark.parametrize(
    ("name", "gpu", "check"),
    [
        ("mi300x", {"uncorrectable": 2}, "GPU memory errors"),
        ("mi300x", {"retired": [0, 1]}, "GPU memory pages"),
        ("mi300x", {"throttled": ["ppt_pwr", "hbm_thrm"]}, "GPU clocks"),
        ("mi300x", {"link_errors": 1}, "GPU links"),
        ("mi355x", {"used": 40 * GIB}, "GPU memory in use"),
        ("h100", {"uncorrectable": 1}, "GPU memory errors"),
        ("h100", {"remap_pending": True}, "GPU memory pages"),
        ("a100", {"remap_failed": True}, "GPU memory pages"),
        ("h100", {"throttled": ["hardware thermal"]}, "GPU clocks"),
        ("b200", {"links_down": 1, "links": 17}, "GPU links"),
    ],
)
def test_a_sick_gpu_is_named(tmp_path: Path, name: str, gpu: dict[str, object], check: str) -> None:
    answers = probes(KINDS[name])
    answers[KINDS[name].vendor]["gpus"][5].update(gpu)
    bad = wrong(health.checks(patient(tmp_path, KINDS[name], answers=answers)))
    assert bad.keys() == {check} and bad[check].found.startswith("GPU 5 ")
    assert ("amd-smi" if KINDS[name].vendor == "amd" else "nvidia-smi") in bad[check].mend


def test_the_power_cap_and_what_a_gpu_can_not_tell_are_no_faults(tmp_path: Path) -> None:
    answers = probes(KINDS["mi250x"])
    answers["amd"]["gpus"][0] = {"id": "0000:00:00.0", "throttled": ["ppt_pwr"], "uncorrectable": None, "used": None}
    assert not wrong(health.checks(patient(tmp_path, KINDS["mi250x"], answers=answers)))


def test_a_folder_that_can_not_be_written(tmp_path: Path) -> None:
    write(tmp_path, {"file": ""})
    here = patient(tmp_path / "root", KINDS["none"], f"LOG_DIR={tmp_path / 'file'}")
    disk = found(storage.checks(here), "disk LOG_DIR")
    assert disk.status == "problem" and str(tmp_path / "file") in disk.found and "LOG_DIR=" in disk.mend


def test_the_disk_is_measured_and_left_clean(tmp_path: Path) -> None:
    here = patient(tmp_path / "root", KINDS["none"], f"LOG_DIR={tmp_path / 'new/run'}", f"SAVE_CKPT_PATH={tmp_path}")
    findings = list(storage.checks(here))
    assert len(findings) == 1 and "GB/s written and synced" in findings[0].found  # both are on the same folder
    assert [path.name for path in tmp_path.iterdir()] == ["root"]


def test_a_name_that_the_system_refuses(tmp_path: Path) -> None:
    """As a folder that is closed to this user: looking for it is an error, not a no."""
    name = tmp_path / ("n" * 300)
    words = [f"{key}={name}" for key in ("LOG_DIR", "LOAD_CKPT_PATH", "TOKENIZER_MODEL")]
    for number, word in enumerate(words):
        told = command.examined(patient(tmp_path / str(number), KINDS["none"], "MODEL_SIZE=tiny", word))
        said = " ".join(finding.found for finding in told.findings if finding.status == "problem")
        assert not told.can_train and "File name too long" in said and str(name) in said


def test_the_file_on_which_the_disk_is_measured_has_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(os, "fsync", lambda handle: seen.append(os.listdir(tmp_path)))
    assert storage.speed(tmp_path)
    assert seen == [[]]


@pytest.mark.parametrize("mask", ["", "-1", "0"])
def test_a_mask_of_nothing(tmp_path: Path, mask: str) -> None:
    here = patient(tmp_path, KINDS["none"], said={"CUDA_VISIBLE_DEVICES": mask})
    assert "masks" not in {finding.check for finding in devices.checks(here)}


def test_nothing_is_measured_without_torch(tmp_path: Path) -> None:
    answers = probes(KINDS["none"], torch={"error": "OSError: libamdhip64.so.7", "absent": False})
    words = ("MODEL_SIZE=tiny", "GPUS_PER_NODE=2")
    told = command.examined(patient(tmp_path, KINDS["none"], *words, answers=answers), network=True, gemm=True)
    assert not told.can_train and not told.network and not told.gemm
    assert all(found(told.findings, option).status == "warning" for option in ("--network", "--gemm"))


@pytest.mark.parametrize("option", ["network", "gemm"])
def test_no_room_for_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    here = patient(tmp_path / "root", KINDS["none"], "MODEL_SIZE=tiny", "GPUS_PER_NODE=2")
    told = found(command.examined(here, **{option: True}).findings, f"--{option}")
    assert told.status == "problem" and "No such file" in told.found and "TMPDIR" in told.mend


def test_a_run_that_is_refused(tmp_path: Path) -> None:
    """What `train` would refuse the doctor does too, also where it is found by the last checks before the start."""
    environment = tree(tmp_path, KINDS["none"])
    asked = command.examined(patient(tmp_path, KINDS["none"], "MODEL_SIZE=405", environment=environment))
    assert not asked.can_train and "MODEL_SIZE=405" in found(asked.findings, "run").found
    small = replace(KINDS["h100"], device_memory=8 * GIB)
    unasked = found(command.examined(patient(tmp_path / "small", small, devices=1)).findings, "run")
    assert unasked.status == "warning" and "MODEL_SIZE=tiny" in unasked.mend
    words = ("MODEL_SIZE=tiny", f"LOAD_CKPT_PATH={tmp_path / 'nothing'}")
    asked = command.examined(patient(tmp_path, KINDS["none"], *words, environment=environment))
    assert not asked.can_train and "LOAD_CKPT_PATH" in found(asked.findings, "run").found
