"""train_llama_slurm.sh under a fake Slurm: what it passes on, to how many nodes, and what it refuses."""

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "llama" / "train_llama_slurm.sh"

SCONTROL = """#!/usr/bin/env bash
case "$1 $2" in
"show hostnames") [[ $3 == "node[1-3]" ]] || exit 1; printf 'node%d\\n' 1 2 3 ;;
"show job") printf '   UserId=x\\n   Command=%s 8 2\\n' "$SUBMITTED" ;;
esac
"""

# Runs the command once per node, one after another, each with its SLURM_NODEID, and fails with the last failure.
SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" >"$LOG.srun"
while [[ $1 == --* ]]; do shift; done
status=0
for ((i = 0; i < SLURM_JOB_NUM_NODES; i++)); do SLURM_NODEID=$i "$@" || status=$?; done
exit $status
"""

TRAIN = """#!/usr/bin/env bash
printf '%s\\n' "${0##*/}" "$@" END >>"$LOG"
for argument; do [[ $argument != DRY_RUN=1 ]] || dry=1; done
[[ -z ${REFUSE:-} ]] || { echo "megatron-rocm: no" >&2; exit 2; }
[[ -n ${dry:-} ]] || exit "${STATUS:-0}"
"""


class Cluster:
    """A checkout and a PATH with fake scontrol and srun; `train` runs the script as a job of three nodes."""

    def __init__(self, folder: Path):
        self.folder, self.log, self.bin = folder, folder / "log", folder / "bin"
        self.scripts = folder / "check out" / "examples" / "llama"
        self.scripts.mkdir(parents=True)
        self.bin.mkdir()
        for name, text in {"scontrol": SCONTROL, "srun": SRUN}.items():
            self.write(self.bin / name, text)
        for name in ("train_llama2.sh", "train_llama3.sh"):
            self.write(self.scripts / name, TRAIN)
        self.script = Path(shutil.copy(SCRIPT, self.scripts))
        for tool in ("bash", "sed", "dirname", "env", "cat"):
            (self.bin / tool).symlink_to(shutil.which(tool))

    @staticmethod
    def write(path: Path, text: str) -> None:
        path.write_text(text)
        path.chmod(0o755)

    def train(self, *arguments: str, script: Path | None = None, **environ: str) -> subprocess.CompletedProcess:
        job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "3", "SLURM_JOB_NODELIST": "node[1-3]"}
        known = {"PATH": str(self.bin), "LOG": str(self.log), "SUBMITTED": str(self.script), **job, **environ}
        command = [shutil.which("bash"), str(script or self.script), *arguments]
        return subprocess.run(command, env=known, cwd=self.folder, capture_output=True, text=True, timeout=60)

    def calls(self) -> list[list[str]]:
        """One list of arguments for each call of a train script, the script's name first."""
        text = self.log.read_text() if self.log.exists() else ""
        return [call.strip("\n").split("\n") for call in text.split("END\n") if call]


@pytest.fixture
def cluster(tmp_path):
    return Cluster(tmp_path)


COMMON = ["NNODES=3", "MASTER_ADDR=node1", "MASTER_PORT=29475"]


def test_each_node_runs_the_train_script_with_its_rank(cluster):
    done = cluster.train("8", "2", "16", "4096", "50", "0", "1", "20", "TP=2", "EXP_NAME=it's; $(touch bad) `x`")
    assert (done.returncode, done.stderr) == (0, "")
    shared = ["train_llama3.sh", "MODEL_SIZE=8", "MBS=2", "BS=48", "SEQ_LENGTH=4096", "TOTAL_ITERS=50", "FSDP=0"]
    shared += ["RECOMPUTE=1", "RECOMPUTE_NUM_LAYERS=20", "TP=2", "EXP_NAME=it's; $(touch bad) `x`", *COMMON]
    check, *nodes = cluster.calls()
    assert check == [*shared, "NODE_RANK=0", "DRY_RUN=1"]
    assert nodes == [[*shared, f"NODE_RANK={rank}"] for rank in range(3)]
    assert not (cluster.folder / "bad").exists()
    options = Path(f"{cluster.log}.srun").read_text().splitlines()
    assert {"--nodes=3", "--ntasks-per-node=1", "--kill-on-bad-exit=1"} <= set(options)


def test_what_is_left_off_is_left_to_the_train_script(cluster):
    assert cluster.train(MODEL_NAME="llama2").returncode == 0
    assert cluster.calls()[0] == ["train_llama2.sh", *COMMON, "NODE_RANK=0", "DRY_RUN=1"]


def test_arguments_win_over_the_environment(cluster):
    done = cluster.train("MODEL_NAME=llama2", "MASTER_ADDR=10.0.0.1", MODEL_NAME="llama3", MASTER_PORT="1234")
    assert done.returncode == 0
    assert cluster.calls()[1] == [
        "train_llama2.sh",
        "NNODES=3",
        "MASTER_ADDR=10.0.0.1",
        "MASTER_PORT=1234",
        "NODE_RANK=0",
    ]


def test_the_exit_status_of_training_is_passed_on(cluster):
    assert cluster.train(STATUS="7").returncode == 7


def test_a_mistake_is_told_once_and_nothing_is_started(cluster):
    done = cluster.train(REFUSE="1")
    assert (done.returncode, done.stderr) == (2, "megatron-rocm: no\n")
    assert len(cluster.calls()) == 1


@pytest.mark.parametrize("how", [{"DRY_RUN": "1"}, {}], ids=["environment", "argument"])
def test_a_dry_run_starts_nothing(cluster, how):
    assert cluster.train(*([] if how else ["DRY_RUN=1"]), **how).returncode == 0
    assert [call[-1] for call in cluster.calls()] == ["DRY_RUN=1"]


@pytest.mark.parametrize("where", ["submitted", "submit folder"])
def test_the_copy_in_slurms_spool_finds_the_scripts(cluster, where):
    spool = cluster.folder / "spool"
    spool.mkdir()
    shutil.copy(SCRIPT, spool / "slurm_script")
    found_by = (
        {} if where == "submitted" else {"SUBMITTED": "(null)", "SLURM_SUBMIT_DIR": str(cluster.scripts.parents[1])}
    )
    assert cluster.train(script=spool / "slurm_script", **found_by).returncode == 0
    assert len(cluster.calls()) == 4


REFUSED = {
    "model name": (["MODEL_NAME=llama4"], {}, "MODEL_NAME=llama4: it is llama2 or llama3"),
    "too many": (["1", "2", "3", "4", "5", "6", "7", "8", "9"], {}, "9 positional arguments, at most 8: MODEL_SIZE"),
    "no number": (["8", "2", "lots"], {}, "BATCH_SIZE_PER_NODE=lots (argument 3)"),
    "zero": (["8", "2", "0"], {}, "BATCH_SIZE_PER_NODE=0 (argument 3)"),
    "arithmetic": (["8", "2", "a[$(touch bad)]"], {}, "BATCH_SIZE_PER_NODE=a[$(touch bad)] (argument 3)"),
    "twice": (["8", "MODEL_SIZE=70"], {}, "MODEL_SIZE is given twice: as argument 1 and as MODEL_SIZE=70"),
    "nodes": (["NNODES=4"], {}, "NNODES comes from the job"),
    "image": ([], {"IMAGE": "some:image"}, "IMAGE=some:image: containers are not supported in this version"),
    "no job": ([], {"SLURM_JOB_ID": ""}, "this is not a Slurm job"),
    "node list": ([], {"SLURM_JOB_NODELIST": "other"}, "scontrol can't expand the node list other"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_one_message(cluster, case):
    arguments, environ, message = REFUSED[case]
    done = cluster.train(*arguments, **environ)
    assert done.returncode == 2
    assert done.stderr.startswith("train_llama_slurm.sh: ") and message in done.stderr
    assert done.stderr.count("\n") == 1
    assert cluster.calls() == []
    assert not (cluster.folder / "bad").exists()


def test_refused_where_scontrol_is_missing(cluster):
    (cluster.bin / "scontrol").unlink()
    done = cluster.train()
    assert (done.returncode, done.stderr) == (
        2,
        "train_llama_slurm.sh: scontrol is not on PATH: it names the job's nodes\n",
    )


def test_refused_where_the_train_script_is_missing(cluster):
    (cluster.scripts / "train_llama2.sh").unlink()
    done = cluster.train("MODEL_NAME=llama2")
    assert done.returncode == 2 and "train_llama2.sh is not found" in done.stderr
