"""C4 as MLPerf's Llama 3.1 405B reference wants it: 1,024 files merged into 8, and the validation samples.

Sources: mlcommons/training large_language_model_pretraining/nemo, utils/consolidate_data.sh and utils/preprocess.sh.
A merged file is its sources' bytes one after the other (gzip members may follow each other), as with `cat`, but each
source is decompressed on the way: a truncated or damaged one is named before it is part of anything.
"""

from __future__ import annotations

import errno
import gzip
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from megatron_rocm.data.source import DECODERS, Damaged
from megatron_rocm.errors import UsageError
from megatron_rocm.platform.disk import sync_folder

TRAIN_FILES, VALIDATION_FILES, MERGED_FILES = 1024, 8, 8
EACH = TRAIN_FILES // MERGED_FILES
BLOCK = 1 << 20
SAY_EVERY = 30.0  # seconds


def train_file(number: int) -> str:
    """The name of one of C4's 1,024 training files."""
    return f"c4-train.{number:05d}-of-{TRAIN_FILES:05d}.json.gz"


def validation_file(number: int) -> str:
    """The name of one of C4's 8 validation files."""
    return f"c4-validation.{number:05d}-of-{VALIDATION_FILES:05d}.json.gz"


def merged_name(shard: int) -> str:
    """The name, without .json.gz, of a merged training file; `shard` is 0 to 7, and MLPerf trains on 6 and 7."""
    return f"c4-train.en_{shard}"


MERGED_VALIDATION = "c4-validation.en"


def samples_name(samples: int) -> str:
    """The name, without .json.gz, of the file with the first so many validation samples."""
    return f"c4-validation-{samples}-samples.en"


def train_files(folder: Path, shard: int) -> list[Path]:
    """The files that become merged file `shard`."""
    return [folder / train_file(number) for number in range(shard * EACH, (shard + 1) * EACH)]


def validation_files(folder: Path) -> list[Path]:
    """The files that hold the validation split, in order."""
    return [folder / validation_file(number) for number in range(VALIDATION_FILES)]


def find(files: Sequence[Path], key: str) -> list[Path]:
    """`files`, if all are there. Raises UsageError, naming `key`, with those that are not."""
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        more = f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""
        raise UsageError(
            f"{key}={files[0].parent}: {missing[0]}{more} of {len(files):,} files are not there. "
            "`DATASET=c4 DOWNLOAD_ONLY=1 bash examples/llama/prepare_dataset.sh` gets them to DATA_DIR/en"
        )
    return list(files)


def merge(sources: Sequence[Path], output: Path, check: bool = True) -> bool:
    """Write the sources' bytes one after the other to `output`; False where it was there.

    Goes on after the last whole source of an earlier call. `check` decompresses every source, for its checksums.
    Raises UsageError for a damaged source, a full disk, and an `output` that is something else.
    """
    sizes = [path.stat().st_size for path in sources]
    facts = [[path.name, size] for path, size in zip(sources, sizes, strict=True)]
    total = sum(sizes)
    if output.exists():
        if output.stat().st_size != total:
            raise UsageError(
                f"{output}: has {output.stat().st_size:,} bytes, its {len(sources)} sources have {total:,}. It was "
                "made of others: move it"
            )
        return False
    notes = output.with_name(f"{output.name}.partial.json")
    with _partial(output) as out:
        done = written = 0  # whole sources, and their bytes
        with suppress(OSError, ValueError, KeyError, TypeError):
            state = json.loads(notes.read_bytes())
            if state["of"] == facts and state["written"] <= out.tell():
                done, written = state["sources"], state["written"]
        out.truncate(written)
        said = time.monotonic()
        for number in range(done, len(sources)):
            _append(sources[number], out, check)
            os.fsync(out.fileno())
            state = {"of": facts, "sources": number + 1, "written": out.tell()}
            _replace(notes, json.dumps(state) + "\n")
            if time.monotonic() - said > SAY_EVERY:
                said = time.monotonic()
                print(f"  {output.name}: {number + 1} of {len(sources)} files, {out.tell() / 1e9:.1f} GB", flush=True)
        if out.tell() != total:
            raise UsageError(f"{output}: its sources changed while they were read. Run the same command again")
    notes.unlink(missing_ok=True)
    return True


def write_samples(sources: Sequence[Path], samples: int, output: Path) -> bool:
    """Write the first `samples` lines of gzip files to one; False where it was there.

    Raises UsageError where there are fewer, for a damaged source, and for a full disk.
    """
    if output.exists():
        return False
    with _partial(output) as out:
        out.truncate(0)
        left = samples
        # Without a time in it the file is the same whenever it is made.
        with gzip.GzipFile("", "wb", 6, out, mtime=0) as packed:
            for line in _lines(sources):
                packed.write(line)
                left -= 1
                if not left:
                    break
        if left:
            raise UsageError(
                f"N_VALIDATION_SAMPLES={samples}: {sources[0].parent} holds only {samples - left:,} validation samples"
            )
    return True


@contextmanager
def _partial(output: Path) -> Iterator[IO[bytes]]:
    """`output`.partial, held against other processes; it becomes `output` if the block ends well."""
    import fcntl

    partial = output.with_name(f"{output.name}.partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "ab") as out:
            try:
                fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(f"{output}: another process is writing it. Wait for that one") from None
            except OSError:
                pass  # a file system without locks
            yield out
            out.flush()
            os.fsync(out.fileno())
            os.replace(partial, output)
            sync_folder(output.parent)
    except OSError as error:
        way_out = "Free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "Check the permissions"
        raise UsageError(
            f"{output}: can't be written ({error.strerror}). {way_out}; the same command then goes on where it stood"
        ) from None


def _replace(path: Path, text: str) -> None:
    fresh = path.with_name(f"{path.name}.new")
    fresh.write_text(text)
    os.replace(fresh, path)


class _Tee:
    """A file whose bytes are written to another as they are read."""

    def __init__(self, file: IO[bytes], out: IO[bytes]) -> None:
        self._file, self._out = file, out

    def read(self, size: int) -> bytes:
        block = self._file.read(size)
        self._out.write(block)
        return block


def _append(source: Path, out: IO[bytes], check: bool) -> None:
    with _readable(source) as file:
        if not source.stat().st_size:
            raise Damaged("is empty")
        if check:
            for _ in DECODERS["gzip"](_Tee(file, out)):
                pass
        else:
            while block := file.read(BLOCK):
                out.write(block)
    out.flush()


@contextmanager
def _readable(source: Path) -> Iterator[Any]:
    try:
        file = open(source, "rb")  # noqa: SIM115
    except OSError as error:
        raise UsageError(
            f"{source}: can't be read ({error.strerror}). Give yourself permission, or get it again"
        ) from None
    try:
        with file:
            yield file
    except Damaged as damage:
        raise UsageError(f"{source}: {damage}. Remove it and download it again") from None


def _lines(sources: Sequence[Path]) -> Iterator[bytes]:
    for source in sources:
        rest = b""
        with _readable(source) as file:
            for text in DECODERS["gzip"](file):
                *lines, rest = (rest + text).split(b"\n")
                for line in lines:
                    yield line + b"\n"
        if rest:
            yield rest + b"\n"
