"""Inputs and jobs for the tests of the engine."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from megatron_rocm.data.engine import Job

TEXTS = [
    f"Document {number}: " + "naïve 日本語, don't <|end_of_text|> </s>  \r\n" * (number % 7) for number in range(300)
]
TEXTS[7] = TEXTS[250] = ""


def lines(texts):
    return "".join(json.dumps({"id": number, "text": text}) + "\n" for number, text in enumerate(texts)).encode()


def write(path: Path, texts=TEXTS) -> Path:
    """The texts in the form that the file's ending says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = lines(texts)
    if path.suffix == ".gz":
        # Two members, as `cat a.gz b.gz` makes them.
        half = raw.index(b"\n", len(raw) // 2) - 5
        raw = gzip.compress(raw[:half]) + gzip.compress(raw[half:])
    elif path.suffix == ".zst":
        import zstandard

        half = len(raw) // 3
        raw = b"".join(zstandard.ZstdCompressor().compress(part) for part in (raw[:half], raw[half:]))
    elif path.suffix == ".parquet":
        import pyarrow as arrow
        import pyarrow.parquet

        arrow.parquet.write_table(arrow.table({"text": texts, "id": range(len(texts))}), path, row_group_size=40)
        return path
    path.write_bytes(raw)
    return path


def pair(prefix) -> tuple[bytes, bytes]:
    """The bytes of PREFIX.bin and PREFIX.idx."""
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


# Runs the job that it is told on its command line, a hundred lines at a time and each of them committed.
RUN = """
import json, sys
from megatron_rocm.data.engine import Job, preprocess
from megatron_rocm.data.tokenizer import TokenizerInfo
from megatron_rocm.errors import UsageError
said = json.loads(sys.argv[1])
said["tokenizer"] = TokenizerInfo(**said["tokenizer"])
if __name__ == "__main__":
    try:
        print(preprocess(Job(**said)))
    except UsageError as error:
        sys.exit(str(error))
"""


def start(job: Job, **options) -> subprocess.Popen:
    """The job in a process of its own."""
    command = [sys.executable, "-c", RUN, json.dumps(asdict(job))]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ}, **options
    )
