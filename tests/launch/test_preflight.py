import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support import tiny_run

from megatron_rocm.errors import UsageError
from megatron_rocm.launch import preflight


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])
def test_a_port_in_use_is_refused_with_a_free_one(address: str) -> None:
    with socket.socket() as taken:
        taken.bind((address, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"MASTER_PORT={port}: .* in use.*MASTER_PORT=\\d+ is free"):
            preflight.check_port(port, patience=0)
    preflight.check_port(port)


def test_a_folder_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="SAVE_CKPT_PATH=.*/file/x: can't write there: Not a directory"):
        preflight.writable("SAVE_CKPT_PATH", tmp_path / "file" / "x")


def test_a_folder_that_the_system_owns_is_refused() -> None:
    with pytest.raises(UsageError, match="LOG_DIR=/proc/here: can't write"):
        preflight.writable("LOG_DIR", Path("/proc/here"))


def test_a_good_folder_is_made_and_left_empty(tmp_path: Path) -> None:
    preflight.writable("LOG_DIR", tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_port_that_a_killed_run_still_holds_is_waited_for() -> None:
    taken = socket.socket()
    taken.bind(("", 0))
    taken.listen()
    threading.Timer(0.5, taken.close).start()
    preflight.check_port(taken.getsockname()[1])


@pytest.mark.parametrize("variable", ["save", "load"])
def test_a_checkpoint_that_is_not_there_is_told(tmp_path: Path, variable: str) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("100")
    with pytest.raises(UsageError, match="iter_0000100 is damaged: the folder is missing"):
        preflight.check(tiny_run(**{variable: str(tmp_path)}))


@pytest.mark.parametrize("name", ["nowhere", "file"])
def test_a_folder_without_checkpoints_is_told(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=f"LOAD_CKPT_PATH=.*{name}: there is no checkpoint"):
        preflight.check(tiny_run(load=str(tmp_path / name)))


def test_looking_for_a_checkpoint_needs_no_torch() -> None:
    code = "import megatron_rocm.launch.preflight, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
