"""The shell scripts as people call them."""

import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_rocm.launch.preflight import free_port

EXAMPLES = Path(__file__).parents[2] / "examples" / "llama"


def script(name: str, *words: str, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    keep = {key: os.environ[key] for key in ("PATH", "HOME", "PYTHONPATH") if key in os.environ}
    return subprocess.run(
        ["bash", str(EXAMPLES / name), *words], cwd=cwd, env={**keep, **more}, capture_output=True, text=True
    )


@pytest.mark.parametrize("name", ["train_llama2.sh", "train_llama3.sh"])
def test_values_are_data(tmp_path: Path, name: str) -> None:
    value = """a "b" 'c'; touch HERE $(touch HERE) `touch HERE` & x"""
    done = script(name, "MODEL_SIZE=tiny", f"EXP_NAME={value}", "DRY_RUN=1", cwd=tmp_path, SAVE_CKPT_PATH=f"{value}/2")
    assert done.returncode in (0, 2), done.stderr
    assert value in done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_argument_wins_over_the_environment(tmp_path: Path) -> None:
    done = script("train_llama3.sh", "SEED=5", "DRY_RUN=1", cwd=tmp_path, SEED="6", MODEL_SIZE="tiny")
    assert done.returncode == 0, done.stderr
    assert ["SEED", "5", "argument"] in [line.split() for line in done.stdout.splitlines()]


def test_a_mistake_is_status_2_without_a_traceback(tmp_path: Path) -> None:
    done = script("train_llama3.sh", "MODEL_SIZE=13", "DRY_RUN=1", cwd=tmp_path)
    assert done.returncode == 2
    assert "MODEL_SIZE=13" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("layout", ["TP=2", "PP=2"])
def test_the_script_trains_and_its_log_can_be_summarized(tmp_path: Path, layout: str) -> None:
    keys = ["MODEL_SIZE=tiny", layout, "TOTAL_ITERS=3", "SEQ_LENGTH=64", f"MASTER_PORT={free_port()}", "LOG_DIR=run"]
    done = script("train_llama3.sh", *keys, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"iteration +\d/ +3 \|.* lm loss: \d", done.stdout)) == 3
    whole, parts = re.findall(r"^start-up: ([0-9.]+) s to the end of the first step \((.*)\)$", done.stdout, re.M)[0]
    seconds = dict(part.rsplit(" ", 1) for part in parts.split(", "))
    assert {"launcher", "torchrun", "imports", "first step"} <= seconds.keys()
    assert sum(map(float, seconds.values())) == pytest.approx(float(whole), abs=0.5)
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {
        "run.json",
        "output_perf.log",
        "metrics.jsonl",
        "loss.png",
    }
    again = script("train_llama3.sh", "NO_TRAINING=1", "LOG_DIR=run", cwd=tmp_path)
    assert again.returncode == 0 and set(again.stdout.splitlines()) <= set(done.stdout.splitlines())


def test_two_launches_by_hand_are_two_nodes(tmp_path: Path) -> None:
    keys = [
        "MODEL_SIZE=tiny",
        "NNODES=2",
        "TOTAL_ITERS=2",
        "SEQ_LENGTH=64",
        f"MASTER_PORT={free_port()}",
        "LOG_DIR=run",
    ]
    with ThreadPoolExecutor() as pool:
        nodes = list(pool.map(lambda rank: script("train_llama3.sh", *keys, f"NODE_RANK={rank}", cwd=tmp_path), (0, 1)))
    assert [node.returncode for node in nodes] == [0, 0], "".join(node.stdout + node.stderr for node in nodes)
    assert "lm loss" in nodes[0].stdout and "lm loss" not in nodes[1].stdout
