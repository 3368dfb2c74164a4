"""Megatron-FSDP and HSDP train as one process does, and their checkpoints are as good as any other layout's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT, environment, execute, losses, metrics, tiny_run, train_all

from megatron_rocm.config.schema import RunConfig

pytestmark = pytest.mark.slow

SHARDED = {"megatron_fsdp": True}
HSDP = {**SHARDED, "dp": 4, "hsdp": True}
TIED = {"tied_embeddings": True}
COMMON = {"train_iters": 5, "eval_iters": 1, "eval_interval": 4}
LAYOUTS = {
    "tp, sequence parallel": {**SHARDED, "dp": 2, "tp": 2, "sequence_parallel": True},
    "vpp, one layer recomputed": {**SHARDED, "dp": 2, "pp": 2, "vpp": 2, "recompute": True, "recompute_num_layers": 1},
    "cp, hsdp": {**SHARDED, "dp": 2, "cp": 2, "hsdp": True},
    "hsdp, recompute": {**HSDP, "recompute": True},
    "tied, pp": {**SHARDED, **TIED, "dp": 2, "pp": 2},
}
# Two steps of one process, then three of these; and two of these, then three in another layout, or in the same.
ONTO = {"onto hsdp": HSDP}
FROM = {"from hsdp": (HSDP, {"dp": 2, "tp": 2, "distributed_optimizer": True})}
SAME = {
    "hsdp, bf16": {**HSDP, "dtype": "bf16"},
    "uneven": {**SHARDED, "dp": 4, "vocab_size": 301, "padded_vocab_size": 513},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunConfig]:
    """All of them, trained: those of one process in one start, those of four in another."""
    folder = tmp_path_factory.mktemp("megatron_fsdp")

    def run(name: str, **fields: object) -> RunConfig:
        return tiny_run(folder / name, **{**COMMON, **fields})

    alone = {
        "alone": run("alone", save=str(folder / "saved alone"), save_interval=2),
        "alone, tied": run("alone, tied", **TIED),
    }
    train_all(*alone.values())
    (folder / "saved alone" / "latest_checkpointed_iteration.txt").write_text("2")
    four = {name: run(name, **layout) for name, layout in LAYOUTS.items()}
    for name, layout in ONTO.items():
        four[name] = run(name, **layout, load=str(folder / "saved alone"))
    for name, (before, after) in FROM.items():
        four[f"{name}, before"] = run(f"{name}, before", **before, train_iters=2, save=str(folder / f"saved {name}"))
        four[name] = run(name, **after, load=str(folder / f"saved {name}"))
    for name, layout in SAME.items():
        save = {"save": str(folder / f"saved {name}")}
        four[f"{name}, whole"] = run(f"{name}, whole", **layout)
        four[f"{name}, first"] = run(f"{name}, first", **layout, **save, train_iters=2)
        four[f"{name}, then"] = run(f"{name}, then", **layout, **save)
    train_all(*four.values())
    return alone | four


def must_be_close(run: RunConfig, reference: RunConfig, first: int = 1) -> None:
    """Losses within 1e-6, norms of the unclipped gradients within 1e-5 relative, from iteration `first` on."""
    expected = {(row["iteration"], field): row[field] for row in metrics(reference) for field in row}
    rows = [row for row in metrics(run) if "lm_loss" in row]
    assert [row["iteration"] for row in rows] == list(range(first, 6))
    for row in rows:
        assert row["lm_loss"] == pytest.approx(expected[row["iteration"], "lm_loss"], abs=1e-6)
        # Clipping and Adam hide a gradient that is scaled wrongly: its norm does not.
        assert row["grad_norm"] == pytest.approx(expected[row["iteration"], "grad_norm"], rel=1e-5)
    for row in metrics(run):
        if "validation_loss" in row:
            assert row["validation_loss"] == pytest.approx(expected[row["iteration"], "validation_loss"], abs=5e-6)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", LAYOUTS)
def test_as_one_process(runs: dict[str, RunConfig], name: str) -> None:
    must_be_close(runs[name], runs["alone, tied" if "tied" in name else "alone"])


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [*ONTO, *FROM])
def test_goes_on_in_another_layout(runs: dict[str, RunConfig], name: str) -> None:
    must_be_close(runs[name], runs["alone"], first=3)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", SAME)
def test_goes_on_exactly(runs: dict[str, RunConfig], name: str) -> None:
    assert losses(runs[f"{name}, then"]) == losses(runs[f"{name}, whole"])[2:]


@pytest.mark.timeout(600)
def test_exports_to_hugging_face(runs: dict[str, RunConfig], tmp_path: Path) -> None:
    """With the same logits; the checkpoint is HSDP's, of BF16 training."""
    program = [sys.executable, str(ROOT / "tools" / "convert_megatron_to_hf.py")]
    source = runs["hsdp, bf16, then"].checkpoint.save
    done = subprocess.run(
        [*program, str(source), str(tmp_path / "hf"), "--verify"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "the two sides agree" in done.stdout


@pytest.mark.timeout(300)
def test_gradients_are_those_of_data_parallel_training(tmp_path: Path) -> None:
    """Also where they are reduced in BF16, and tensor parallel ranks and pipeline stages add up theirs afterwards."""
    exact = {"dp": 2, "tp": 2, "sequence_parallel": True, "hidden_size": 96}
    rounded = {"dp": 2, "dtype": "bf16", "grad_reduce_in_bf16": True, "train_iters": 1}
    plain = [
        tiny_run(tmp_path / "0", **exact),
        tiny_run(tmp_path / "1", **rounded, tp=2, sequence_parallel=True),
        tiny_run(tmp_path / "2", **rounded, pp=2, **TIED),
    ]
    files = [str(Path(run.launch.log_dir) / "run.json") for run in plain]
    for run, file in zip(plain, files, strict=True):
        Path(file).parent.mkdir()
        run.save(file)
    program = Path(__file__).parent / "megatron_fsdp_gradients.py"
    text = execute(plain[0], str(program), *files, timeout=250)
    in_fp32, in_bf16, tied = json.loads(next(line for line in text.splitlines() if line.startswith("[{")))
    assert in_fp32["difference"] < 1e-5
    assert in_bf16["difference"] < 2e-2
    assert tied["difference"] < 2e-2
    # Half of the shard, and what pads it, on each of two processes; nothing else before the first step.
    assert in_fp32["whole"] / 2 <= in_fp32["share"] < in_fp32["whole"] / 2 * 1.1
    assert in_fp32["gathered"] == 0
