"""Which files a folder's are, and files that only seem to be whole."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from pathlib import Path

import engine_jobs
import pytest

from megatron_rocm.data import source


def test_a_link_into_a_loop_is_followed_once(tmp_path: Path) -> None:
    engine_jobs.write(tmp_path / "a" / "in.jsonl")
    os.symlink(tmp_path, tmp_path / "a" / "loop")
    found = source.find([str(tmp_path)], "--input")
    assert [os.path.realpath(one.path) for one in found] == [str(tmp_path / "a" / "in.jsonl")]


def test_what_a_run_has_made_of_a_folder_is_not_its_text(tmp_path: Path) -> None:
    engine_jobs.write(tmp_path / "in.json")
    for name in ("out_text_document.bin", "out_text_document.idx", "out_text_document.json"):
        (tmp_path / name).write_text("{}")
    assert [Path(one.path).name for one in source.find([str(tmp_path)], "--input")] == ["in.json"]


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_an_empty_compressed_file_is_a_truncated_one(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"in.jsonl.{ending}"
    path.touch()
    (chunk,) = source.read(0, source.file(str(path)), 0, "text", 1000)
    assert chunk.fault and "is truncated" in str(chunk.fault)


def test_a_closed_standard_input_is_said_so() -> None:
    code = "from megatron_rocm.data import source; list(source.read(0, source.find(['-'], '--input')[0], 0, 'text', 9))"
    done = subprocess.run([sys.executable, "-c", f"import os; os.close(0); {code}"], capture_output=True, text=True)
    assert "UsageError: --input=-: there is no standard input" in done.stderr


def test_zeros_may_follow_a_member_wherever_blocks_end(tmp_path):
    path = tmp_path / "in.jsonl.gz"
    one = gzip.compress(b'{"text": "a"}\n')
    path.write_bytes(one + b"\0" * (2 * source.BLOCK + 7) + one + b"\0" * source.BLOCK)
    chunks = list(source.read(0, source.file(str(path)), 0, "text"))
    assert [chunk.fault for chunk in chunks] == [None] and chunks[0].payload == b'{"text": "a"}\n' * 2
