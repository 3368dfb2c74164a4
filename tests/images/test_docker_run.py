"""examples/llama/docker_run.sh: the flags for each vendor and engine, and what of the environment goes in."""

import importlib.util
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rocm.config.schema import variables
from megatron_rocm.errors import UsageError
from megatron_rocm.platform.machine import TARGETS, Machine, find
from megatron_rocm.platform.settings import LIBRARY_PREFIXES

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "llama" / "docker_run.sh"
spec = importlib.util.spec_from_file_location("docker_run", ROOT / "tools" / "docker_run.py")
docker_run = importlib.util.module_from_spec(spec)
sys.modules["docker_run"] = docker_run  # dataclasses look their module up
spec.loader.exec_module(docker_run)

DOCKER, PODMAN = docker_run.Engine("docker"), docker_run.Engine("podman", podman=True)
ROOTLESS = docker_run.Engine("podman", podman=True, rootless=True)
AMD, NVIDIA = ("mi250x", "mi300x", "mi355x"), ("a100", "h100", "b200")
GPU_FLAGS = {"--device", "--gpus", "--group-add", "--security-opt"}


def amd_tree(root: Path) -> Path:
    """Two MI300X. /dev as listed in ROCm/ROCm-docker pull request 93."""
    for name in ("dev/kfd", "dev/dri/card1", "dev/dri/renderD128", "dev/dri/renderD129", "dev/infiniband/uverbs0"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    for number, simds in enumerate((0, 1216, 1216)):
        node = root / "sys/class/kfd/kfd/topology/nodes" / str(number)
        node.mkdir(parents=True)
        (node / "properties").write_text(f"simd_count {simds}\ngfx_target_version 90402\n")
    return root


def owner(path: Path) -> int:
    return {"kfd": 992, "renderD128": 992, "renderD129": 110}[path.name]


def command(
    machine: Machine, engine=DOCKER, folder: Path = Path("/"), root: Path = Path("/"), **said: str
) -> list[str]:
    host = docker_run.Host(machine, 1000, 100, memlock=2**23, root=root, owner=owner)
    return docker_run.command(host, engine, said, folder, ["megatron-rocm", "doctor"])


def values(line: list[str], flag: str) -> list[str]:
    return [value for name, value in zip(line, line[1:], strict=False) if name == flag]


def test_amd(tmp_path):
    root = amd_tree(tmp_path)
    line = command(find("", {}, root), root=root)
    assert values(line, "--device") == ["/dev/kfd", "/dev/dri", "/dev/infiniband"]
    assert values(line, "--group-add") == ["110", "992"]
    assert values(line, "--security-opt") == ["seccomp=unconfined"]
    assert line[-3:] == ["megatron-rocm:rocm", "megatron-rocm", "doctor"]


@pytest.mark.parametrize("name", TARGETS)
def test_every_machine_has_its_vendors_flags_and_what_all_have(name):
    line = command(find(name))
    assert values(line, "--device") == (["/dev/kfd", "/dev/dri"] if name not in (*NVIDIA, "h200") else [])
    assert values(line, "--gpus") == (["all"] if name in (*NVIDIA, "h200") else [])
    assert line[-3] == f"megatron-rocm:{'cuda' if name in (*NVIDIA, 'h200') else 'rocm'}"
    for flag, value in {"--network": "host", "--ipc": "host", "--ulimit": "memlock=-1", "--user": "1000:100"}.items():
        assert values(line, flag) == [value]
    assert "--privileged" not in line


def test_vendors_differ_in_nothing_else(tmp_path):
    def rest(machine):
        line = command(machine, root=tmp_path)[:-3]
        pairs = list(zip(line[3::2], line[4::2], strict=True))
        return [pair for pair in pairs if pair[0] not in GPU_FLAGS]

    assert rest(find("mi300x")) == rest(find("h100")) == rest(find("cpu", {"PATH": ""}))
    assert not GPU_FLAGS & {*command(find("cpu", {"PATH": ""}), root=tmp_path)}


@pytest.mark.parametrize(("engine", "user"), [(PODMAN, []), (ROOTLESS, ["keep-id"])])
def test_podman(tmp_path, engine, user):
    root = amd_tree(tmp_path)
    line = command(find("", {}, root), engine, root=root)
    assert line[0] == "podman" and values(line, "--userns") == user
    assert values(line, "--group-add") == (["keep-groups"] if engine.rootless else ["110", "992"])
    assert values(line, "--ulimit") == [f"memlock={2**23}"]
    assert "label=disable" in values(line, "--security-opt")
    assert values(command(find("h100"), engine), "--device") == ["nvidia.com/gpu=all"]


@pytest.mark.parametrize(
    ("rights", "may_raise"), [("000001ffffffffff", True), ("000001fffeffffff", False), ("0", False)]
)
def test_memory_is_pinned_without_limit_where_that_may_be_had(tmp_path, rights, may_raise):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/status").write_text(f"Name:\tbash\nCapEff:\t{rights}\n")
    hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    assert docker_run.most_memlock(tmp_path) == (resource.RLIM_INFINITY if may_raise else hard)


def test_the_folder_is_mounted_where_it_is(tmp_path):
    (tmp_path / "a b" / "run").mkdir(parents=True)
    cpu, inner = find("cpu", {"PATH": ""}), tmp_path / "a b" / "run"
    line = command(cpu, folder=inner)
    assert (values(line, "--volume"), values(line, "--workdir")) == ([f"{inner}:{inner}"], [str(inner)])
    line = command(cpu, folder=inner, HOST_MOUNT=str(tmp_path), CONTAINER_MOUNT="/data")
    assert (values(line, "--volume"), values(line, "--workdir")) == ([f"{tmp_path}:/data"], ["/data/a b/run"])


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"HOST_MOUNT": "/nowhere"}, "HOST_MOUNT=/nowhere: it is a folder that holds the current one"),
        ({"HOST_MOUNT": "/usr"}, "HOST_MOUNT=/usr"),
        ({"CONTAINER_MOUNT": "data"}, "can't be mounted as data"),
        ({"CONTAINER_MOUNT": "/a:b"}, "can't be mounted as /a:b"),
        ({"CONTAINER_FLAGS": "--volume 'x"}, "CONTAINER_FLAGS=--volume 'x: No closing quotation"),
    ],
)
def test_what_can_not_be_is_refused(tmp_path, said, message):
    with pytest.raises(UsageError, match=message):
        command(find("cpu", {"PATH": ""}), folder=tmp_path, **said)


def test_what_a_run_reads_goes_in_by_name_and_no_value_does(tmp_path):
    secret = {"HF_TOKEN": "hf_1", "WANDB_API_KEY": "2", "AWS_SECRET_ACCESS_KEY": "3"}
    read = {"MODEL_SIZE": "8", "NCCL_DEBUG": "INFO", "HIP_VISIBLE_DEVICES": "0", "HF_HOME": f"{tmp_path}/cache"}
    not_read = {"PATH": "/bin", "HOME": "/root", "LD_PRELOAD": "x", "CUDA_HOME": "/usr/local/cuda", "DRY_RUN": "1"}
    line = command(find("cpu", {"PATH": ""}), folder=tmp_path, **secret, **read, **not_read)
    assert values(line, "--env") == sorted(secret | read)
    assert not {*secret.values()} & {*line}
    host = docker_run.Host(find("cpu", {"PATH": ""}), 0, 0)
    told = docker_run.notes(host, {**not_read, "DATA_PATH": "/data/x"}, tmp_path)
    assert [note.partition(" is outside")[0] for note in told] == ["CUDA_HOME=/usr/local/cuda", "DATA_PATH=/data/x"]


def test_every_variable_and_library_of_ours_can_go_in(tmp_path):
    ours = {variable.name for variable in variables()} - docker_run.OURS
    libraries = {f"{prefix}X" for prefix in LIBRARY_PREFIXES}
    assert {*docker_run.forwarded(dict.fromkeys(ours | libraries, "1"), tmp_path)} == ours | libraries


def test_gpus_without_a_driver_are_told(tmp_path):
    device = tmp_path / "sys/bus/pci/devices/0000:05:00.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text("0x1002\n")
    (device / "class").write_text("0x120000\n")
    host = docker_run.Host(find("", {"PATH": ""}, tmp_path), 0, 0, root=tmp_path)
    assert docker_run.notes(host, {}, tmp_path) == [
        "1 devices of amd on the bus can't be used (driver, or a mask): this is for the CPU"
    ]


@pytest.fixture
def host(tmp_path):
    """A folder whose bin/ is all of PATH, and a way to call the script there."""

    def call(*words: str, engine: str = "docker", version: str = "Docker version 28", **said: str):
        programs = tmp_path / "bin"
        programs.mkdir(exist_ok=True)
        for tool in ("bash", "dirname", "env"):
            if not (programs / tool).exists():
                (programs / tool).symlink_to(f"/usr/bin/{tool}")
        for name, text in {
            "python3": f'exec "{sys.executable}" "$@"',
            engine: f'[[ $1 == --version ]] && echo "{version}" && exit\nprintf "%s\\n" "$@" >>"{tmp_path}/calls"\n'
            '[[ $1 != image ]] || { echo "Error: ${STATE:-}" >&2; [[ -z ${STATE:-} ]]; exit; }\nexit 7',
        }.items():
            (programs / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
            (programs / name).chmod(0o755)
        return subprocess.run(
            ["bash", str(SCRIPT), *words], cwd=tmp_path, env={"PATH": str(programs), **said},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    return call


def test_a_dry_run_prints_the_command_and_starts_nothing(host, tmp_path):
    done = host("train_llama3.sh", "EXP_NAME=a b; $(touch bad)", DRY_RUN="1", TARGET="mi300x")
    assert done.returncode == 0, done.stderr
    line = shlex.split(done.stdout)
    assert line[:3] == ["docker", "run", "--rm"]
    assert line[-3:] == ["megatron-rocm:rocm", "train_llama3.sh", "EXP_NAME=a b; $(touch bad)"]
    assert {path.name for path in tmp_path.iterdir()} == {"bin"}


def test_the_container_runs_and_its_status_is_the_scripts(host, tmp_path):
    done = host("true", TARGET="cpu", IMAGE="mine:1", CONTAINER_FLAGS="--user 5:5")
    assert done.returncode == 7, done.stderr
    assert (tmp_path / "calls").read_text().splitlines()[-4:] == ["--user", "5:5", "mine:1", "true"]


def test_podman_by_dockers_name_is_podman(host):
    done = host(version="podman version 4.3.1", DRY_RUN="1", TARGET="h100")
    assert "nvidia.com/gpu=all" in done.stdout and "--gpus" not in done.stdout


MISTAKES = {
    "no image": (
        {"STATE": "No such image: x", "TARGET": "cpu"},
        "there is no image megatron-rocm:rocm: docker build -f",
    ),
    "another machine": ({"TARGET": "mi300x"}, "TARGET=mi300x: this is another machine; DRY_RUN=1 shows"),
    "unknown machine": ({"TARGET": "mi400x"}, "TARGET=mi400x: no such machine"),
    "no engine": ({"engine": "lxc", "TARGET": "cpu"}, "neither docker nor podman is on PATH"),
    "no such engine": ({"CONTAINER_ENGINE": "nerdctl", "TARGET": "cpu"}, "CONTAINER_ENGINE=nerdctl: no such program"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_message(host, case):
    said, message = MISTAKES[case]
    done = host(**said)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_no_package_is_needed():
    """-S: without what is installed. DRY_RUN looks at the machine as well."""
    done = subprocess.run(
        [sys.executable, "-S", str(ROOT / "tools" / "docker_run.py")],
        env={"DRY_RUN": "1", "PATH": ""}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.startswith("docker run"), done.stderr
