"""Detection over trees in the form of the kernel's, and over a stand-in for nvidia-smi."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rocm.errors import UsageError
from megatron_rocm.platform.machine import GIB, TARGETS, detect, find

ID = 0xABC0000000000000
CPU_NODE = "cpu_cores_count 64\nsimd_count 0\nunique_id 0\n"


def amd_tree(root: Path, gpus: int, memory: int, version: int = 90402) -> Path:
    """A `/sys/class/kfd` as the kernel lays it out: node 0 is the CPU, each GPU or partition a node of its own."""
    nodes = root / "sys/class/kfd/kfd/topology/nodes"
    for number in range(gpus + 1):
        node = nodes / str(number)
        (node / "mem_banks/0").mkdir(parents=True)
        gpu = number > 0
        (node / "properties").write_text(
            f"cpu_cores_count 0\nsimd_count 1216\ngfx_target_version {version}\nunique_id {ID + number}\n"
            if gpu
            else CPU_NODE
        )
        (node / "mem_banks/0/properties").write_text(
            f"heap_type {1 if gpu else 0}\nsize_in_bytes {memory if gpu else GIB}\n"
        )
    (root / "proc").mkdir()
    (root / "proc/meminfo").write_text("MemTotal:       2097152000 kB\n")
    return root


def nvidia_smi(folder: Path, rows: list[str], listing: str = "") -> dict[str, str]:
    script = folder / "nvidia-smi"
    body = "\n".join(rows)
    script.write_text(f"#!/bin/sh\nif [ \"$1\" = -L ]; then cat <<'E'\n{listing}\nE\nelse cat <<'E'\n{body}\nE\nfi\n")
    script.chmod(0o755)
    return {"PATH": f"{folder}:/usr/bin:/bin"}


H100 = [f"GPU-{n}a, NVIDIA H100 80GB HBM3, 81559, 9.0" for n in range(8)]


def test_amd_gpus_and_memory(tmp_path):
    machine = detect({}, amd_tree(tmp_path, 8, 192 * GIB))
    assert (machine.vendor, machine.arch, len(machine.gpus), machine.gpu_memory) == ("amd", "gfx942", 8, 192 * GIB)
    assert machine.host_memory == 2097152000 * 1024


@pytest.mark.parametrize(
    ("version", "arch"), [(90010, "gfx90a"), (90402, "gfx942"), (90500, "gfx950"), (100300, "gfx1030")]
)
def test_amd_architecture(tmp_path, version, arch):
    assert detect({}, amd_tree(tmp_path, 1, GIB, version)).arch == arch


def test_partitions_are_devices_of_their_own(tmp_path):
    root = amd_tree(tmp_path, 64, 24 * GIB)  # 8 × MI300X in CPX/NPS4
    card = root / "sys/class/drm/card0/device"
    card.mkdir(parents=True)
    (card / "current_compute_partition").write_text("CPX\n")
    (card / "current_memory_partition").write_text("NPS4\n")
    machine = detect({}, root)
    assert (len(machine.gpus), machine.gpu_memory, machine.partition) == (64, 24 * GIB, "CPX/NPS4")


@pytest.mark.parametrize(
    ("masks", "left"),
    [
        ({"HIP_VISIBLE_DEVICES": "0,1"}, 2),
        ({"ROCR_VISIBLE_DEVICES": "4,5,6,7"}, 4),
        (
            {"ROCR_VISIBLE_DEVICES": "4,5,6,7", "HIP_VISIBLE_DEVICES": "0,3,4"},
            2,
        ),  # HIP counts what ROCr left: 4 is none
        ({"CUDA_VISIBLE_DEVICES": "2"}, 1),
        ({"CUDA_VISIBLE_DEVICES": "2", "HIP_VISIBLE_DEVICES": "0,1,2"}, 3),
        ({"ROCR_VISIBLE_DEVICES": "GPU-abc0000000000001,GPU-ABC0000000000002"}, 2),
        ({"HIP_VISIBLE_DEVICES": ""}, 8),  # to HIP an empty mask is none
        ({"HIP_VISIBLE_DEVICES": "", "CUDA_VISIBLE_DEVICES": "1"}, 1),
        ({"HIP_VISIBLE_DEVICES": "0,9,1"}, 1),
    ],
)
def test_amd_masks(tmp_path, masks, left):
    assert len(detect(masks, amd_tree(tmp_path, 8, GIB)).gpus) == left


@pytest.mark.parametrize("mask", ["-1", "none"])
def test_everything_masked_is_a_cpu(tmp_path, mask):
    assert detect({"HIP_VISIBLE_DEVICES": mask}, amd_tree(tmp_path, 2, GIB)).vendor == "cpu"


def test_nvidia(tmp_path):
    machine = detect(nvidia_smi(tmp_path, H100), tmp_path)
    assert (machine.vendor, machine.arch, len(machine.gpus)) == ("nvidia", "sm_90", 8)
    assert machine.gpu_memory == 81559 * 2**20


def test_nvidia_masks(tmp_path):
    environment = nvidia_smi(tmp_path, H100)
    assert len(detect({**environment, "CUDA_VISIBLE_DEVICES": "0,GPU-3a"}, tmp_path).gpus) == 2
    assert detect({**environment, "CUDA_VISIBLE_DEVICES": ""}, tmp_path).vendor == "cpu"


def test_mig_instances_stand_for_their_gpu(tmp_path):
    listing = (
        "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-0a)\n"
        "  MIG 3g.40gb     Device  0: (UUID: MIG-1)\n  MIG 3g.40gb     Device  1: (UUID: MIG-2)\n"
        "GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-1a)"
    )
    machine = detect(nvidia_smi(tmp_path, H100[:2], listing), tmp_path)
    assert [gpu.memory for gpu in machine.gpus] == [40 * 10**9, 40 * 10**9, 81559 * 2**20]


def test_cgroup_limit_is_the_memory(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 1000000 kB\n")
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("4096\n")
    assert detect({"PATH": ""}, tmp_path).host_memory == 4096


def test_target_cpu_hides_gpus(tmp_path):
    machine = find("cpu", {}, amd_tree(tmp_path, 8, GIB))
    assert machine.vendor == "cpu" and machine.hides_gpus and machine.is_here


def test_targets():
    for name in TARGETS:
        machine = find(name)
        assert len(machine.gpus) == 8 and not machine.is_here
    with pytest.raises(UsageError, match="TARGET=mi400"):
        find("mi400")


def test_torch_is_not_imported():
    code = "import sys; from megatron_rocm.platform.machine import find; find(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
