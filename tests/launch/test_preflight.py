import socket
from pathlib import Path

import pytest

from megatron_rocm.errors import UsageError
from megatron_rocm.launch import preflight


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])
def test_a_port_in_use_is_refused_with_a_free_one(address: str) -> None:
    with socket.socket() as taken:
        taken.bind((address, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"MASTER_PORT={port}: .* in use.*MASTER_PORT=\\d+ is free"):
            preflight.check_port(port)
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
