"""`megatron-rocm checkpoint …` on a run's folder."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import execute, tiny_run
from torch.distributed.checkpoint.metadata import Metadata

from megatron_rocm.checkpoint.folder import TRACKER
from megatron_rocm.cli import main

Capsys = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints after each of five steps."""
    folder = tmp_path_factory.mktemp("command")
    execute(tiny_run(folder / "run", save=str(folder / "saved"), train_iters=5, save_interval="1"))
    return folder / "saved"


@pytest.fixture
def saved(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "saved"))


def told(capsys: Capsys, *words: str, status: int = 0) -> Any:
    """What the command prints with --json."""
    assert main(["checkpoint", *words, "--json"]) == status
    return json.loads(capsys.readouterr().out)


def names(paths: list[str]) -> list[str]:
    return [Path(path).name for path in paths]


def test_ls(saved: Path, capsys: Capsys) -> None:
    (saved / "iter_0000002" / "common.pt").unlink()
    (saved / "iter_0000006.partial").mkdir()
    found = told(capsys, "ls", str(saved))
    assert [entry["iteration"] for entry in found["checkpoints"]] == [1, 2, 3, 4, 5]
    assert [entry["whole"] for entry in found["checkpoints"]] == [True, False, True, True, True]
    assert [entry["latest"] for entry in found["checkpoints"]] == [False, False, False, False, True]
    assert found["checkpoints"][1]["faults"] == ["common.pt is missing"]
    assert names(found["partial"]) == ["iter_0000006.partial"]
    entry = found["checkpoints"][0]
    files = [file for file in (saved / "iter_0000001").rglob("*") if file.is_file()]
    assert (entry["files"], entry["bytes"]) == (len(files), sum(file.stat().st_size for file in files))
    assert main(["checkpoint", "ls", str(saved)]) == 0
    text = capsys.readouterr().out
    assert "damaged: common.pt is missing" in text and "whole, latest" in text and "next run removes it" in text


def test_a_link_to_nowhere(saved: Path, capsys: Capsys) -> None:
    (saved / "iter_0000009").symlink_to(saved / "nothing")
    entry = told(capsys, "ls", str(saved))["checkpoints"][-1]
    assert (entry["saved"], entry["files"], entry["faults"]) == (None, 0, ["the folder is missing"])
    assert main(["checkpoint", "ls", str(saved)]) == 0


def test_ls_of_an_address(saved: Path, capsys: Capsys) -> None:
    next((saved / "iter_0000002").glob("*.distcp")).unlink()
    found = told(capsys, "ls", f"file://{saved}")["checkpoints"]
    assert [(entry["iteration"], entry["whole"]) for entry in found] == [(n, n != 2) for n in range(1, 6)]
    assert found[4]["latest"] and found[4]["bytes"] > 10**6
    assert main(["checkpoint", "ls", f"file://{saved}"]) == 0
    assert "not whole" in capsys.readouterr().out
    assert main(["checkpoint", "ls", f"file://{saved}/nothing"]) == 2


def test_show(saved: Path, capsys: Capsys) -> None:
    shutil.rmtree(saved / "iter_0000005")
    found = told(capsys, "show", str(saved))  # the newest that is whole
    assert (found["iteration"], found["consumed_samples"], found["saved_by"]) == (4, 16, "megatron-rocm")
    assert found["configuration"]["model"]["hidden_size"] == 64
    assert found["tensors"]["decoder.layers.mlp.linear_fc2.weight"] == {"shape": [4, 64, 160], "dtype": "float32"}
    assert found["optimizer"] == ["exp_avg", "exp_avg_sq"]
    assert main(["checkpoint", "show", str(saved), "--iteration", "2", "--tensors"]) == 0
    text = capsys.readouterr().out
    assert "iteration 2, 8 samples" in text and "hidden_size 64" in text and "linear_fc2.weight  float32" in text
    assert main(["checkpoint", "show", str(saved / "iter_0000001")]) == 0
    assert main(["checkpoint", "show", str(saved), "--iteration", "9"]) == 2
    assert "no checkpoint of iteration 9; there is 1, 2, 3, 4" in capsys.readouterr().err


def test_verify(saved: Path, capsys: Capsys) -> None:
    assert all(entry["whole"] for entry in told(capsys, "verify", str(saved))["checkpoints"])
    file = next((saved / "iter_0000003").glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    found = told(capsys, "verify", str(saved), status=1)["checkpoints"]
    assert [entry["whole"] for entry in found] == [True, True, False, True, True]
    assert found[2]["faults"] == [f"{file.name} is not as it was written: its checksum differs"]
    assert told(capsys, "verify", str(saved), "--iteration", "4")["checkpoints"][0]["whole"]


def test_verify_without_a_manifest(saved: Path, capsys: Capsys) -> None:
    """By the files' own checksums, those of common.pt too; and whatever is wrong with one, all are looked at."""
    for iteration in range(1, 6):
        (saved / f"iter_000000{iteration}" / "manifest.json").unlink()
    common = saved / "iter_0000002" / "common.pt"
    common.write_bytes(common.read_bytes().replace(b"megatron_fsdp", b"megatron_fsdq"))
    content = Metadata(state_dict_metadata={}, storage_data={"a": 1})  # type: ignore[dict-item]
    (saved / "iter_0000003" / ".metadata").write_bytes(pickle.dumps(content))
    found = told(capsys, "verify", str(saved), status=1)["checkpoints"]
    assert [entry["whole"] for entry in found] == [True, False, False, True, True]
    assert found[1]["faults"][0].startswith("common.pt: it is not as it was written")
    assert "not the metadata of a checkpoint, or damaged" in found[2]["faults"][0]


def test_diff(saved: Path, tmp_path: Path, capsys: Capsys) -> None:
    found = told(capsys, "diff", str(saved), status=1)
    assert names([found["a"], found["b"]]) == ["iter_0000004", "iter_0000005"]
    assert found["position"] == ["iteration 4 → 5", "consumed_train_samples 16 → 20"]
    assert not (found["settings"] or found["only in A"] or found["only in B"] or found["values"])
    values = told(capsys, "diff", str(saved), "--values", status=1)["values"]
    assert any(line.startswith("output_layer.weight by up to ") for line in values)
    execute(
        tiny_run(
            tmp_path / "run", load=str(saved), save=str(tmp_path / "other"), train_iters=6, name="sgd", finetune=True
        )
    )
    found = told(capsys, "diff", str(saved), str(tmp_path / "other"), status=1)
    assert "OPTIMIZER adam → sgd: refused" in found["settings"]
    assert all(".exp_avg" in key for key in found["only in A"]) and found["only in A"]
    assert all(".momentum_buffer" in key for key in found["only in B"]) and found["only in B"]
    again = str(saved / "iter_0000005")
    assert main(["checkpoint", "diff", again, again, "--values"]) == 0
    assert "no difference" in capsys.readouterr().out


def test_prune(saved: Path, capsys: Capsys) -> None:
    """The newest whole one stays, whatever the tracker says; a damaged one is not counted, and stays."""
    (saved / "iter_0000005" / "common.pt").unlink()
    words = ("prune", str(saved), "--keep-last", "1", "--keep-every", "3")
    would = told(capsys, *words, "--dry-run")
    assert names(would["removed"]) == ["iter_0000001", "iter_0000002"]
    assert names(would["kept"]) == ["iter_0000003", "iter_0000004"] and names(would["damaged"]) == ["iter_0000005"]
    assert len(list(saved.glob("iter_*"))) == 5
    assert told(capsys, *words) == would
    assert sorted(path.name for path in saved.glob("iter_*")) == ["iter_0000003", "iter_0000004", "iter_0000005"]
    (saved / TRACKER).write_text("3")
    assert told(capsys, "prune", str(saved))["removed"] == []  # what the tracker names stays too
    assert main(["checkpoint", "prune", str(saved), "--keep-last", "0"]) == 2
    assert main(["checkpoint", "prune", str(saved / "iter_0000003")]) == 2


@pytest.mark.parametrize(
    "words", [(), ("ls",), ("show", "nowhere"), ("verify", "."), ("weigh", "."), ("verify", "s3://b/p")]
)
def test_mistakes_are_one_line(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["checkpoint", *words]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_torch_is_not_imported_where_it_is_not_needed(saved: Path) -> None:
    code = (
        "import sys; from megatron_rocm.cli import main\n"
        "for words in (['ls'], ['verify'], ['prune', '--dry-run']):\n"
        "    assert main(['checkpoint', words[0], sys.argv[1], *words[1:]]) == 0\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(saved)], check=True, stdout=subprocess.DEVNULL)
