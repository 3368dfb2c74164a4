"""The engine: documents of any number of files to one PREFIX.bin, PREFIX.idx and PREFIX.json.

One thread reads chunks and writes results in their order, the others parse and encode. No more than a few chunks are in
memory, every few seconds what is written is committed, and a run that ended before its time is gone on with.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor, Future
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rocm.data import documents, encode, source, workers
from megatron_rocm.data.hub import is_hub_name
from megatron_rocm.data.indexed import SIDECAR_FORMAT, IndexedWriter, open_index, publish, read_sidecar, token_dtype
from megatron_rocm.data.journal import Journal, State
from megatron_rocm.data.progress import Progress
from megatron_rocm.data.source import Chunk, Source
from megatron_rocm.data.tokenizer import TokenizerInfo
from megatron_rocm.data.workers import Result, Task
from megatron_rocm.errors import UsageError
from megatron_rocm.platform.disk import to_ourselves

SHOWN_FAULTS = 20
MOST_PEEKED = 16  # chunks that are looked at for the first document


def cores() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class TextFault(UsageError):
    """What is wrong with the text."""


@dataclass(frozen=True)
class Job:
    """What to make of which text.

    inputs       paths, patterns, folders, or "-" for standard input (source.find)
    prefix       PREFIX of the three files, Megatron's `_text_document` included
    key          the JSON key, or Parquet column, of the text
    append_eod   end each document that is not empty with the tokenizer's EOD
    bos          let the tokenizer add its special tokens (the BOS of Llama's)
    skip_empty   leave out empty texts; else they are documents without tokens (or of BOS and EOD), as Megatron's tool
                 makes them
    workers      CPUs that parse and encode
    on_error     "stop" at the first line without a document, or "skip" and count them
    shard        (i, n): the i-th of n parts, from 0; its files are named by `shards.prefix`
    limit        stop after the document with which so many bytes of text are reached
    recorded     the tokenizer as the sidecar names it; None: `tokenizer`, by its resolved path
    chunk        bytes of input a worker gets at a time
    commit       seconds between two commits
    """

    inputs: Sequence[str]
    prefix: str
    tokenizer: TokenizerInfo
    key: str = "text"
    append_eod: bool = False
    bos: bool = True
    skip_empty: bool = False
    workers: int = field(default_factory=cores)
    on_error: str = "stop"
    shard: tuple[int, int] | None = None
    limit: int | None = None
    overwrite: bool = False
    recorded: TokenizerInfo | None = None
    chunk: int = source.CHUNK
    commit: float = 10.0
    input_key: str = "--input"
    output_key: str = "--output-prefix"
    overwrite_flag: str = "--overwrite"
    skip_flag: str | None = "--on-error=skip"


@dataclass(frozen=True)
class Summary:
    """What a run made. `seconds` are those of all its parts; `made` is false where it had been made before."""

    prefix: str
    documents: int
    tokens: int
    bytes: int
    skipped: int
    passed_over: int
    seconds: float
    checksum: str
    encoder: str
    made: bool

    def __str__(self) -> str:
        rate = f", {self.bytes / 1e6 / self.seconds:,.1f} MB/s" if self.seconds else ""
        return (
            f"{self.prefix}: {self.documents:,} documents, {self.tokens:,} tokens, {self.bytes:,} bytes of text "
            f"({self.bytes / max(self.tokens, 1):.2f} a token), {self.skipped:,} lines skipped, "
            f"{self.seconds:.1f} s{rate}, {self.checksum}"
        )


def preprocess(job: Job, sources: Sequence[Source] | None = None, chooser: encode.Chooser | None = None) -> Summary:
    """Do the job, or what is left of it; nothing has its final name until it is whole.

    `sources` instead of what `job.inputs` finds; `chooser` where several jobs share a tokenizer. The same job over its
    own finished output does nothing. Raises UsageError for everything a person can mend: after a fault in the text and
    after a full disk what is done is kept, and the same job goes on with it.
    """
    encode.set_up_process()
    everything = list(source.find(job.inputs, job.input_key) if sources is None else sources)
    seekable = all(one.kind != "stdin" for one in everything)
    if job.shard and not seekable:
        raise UsageError(f"{job.input_key}=-: standard input can't be divided into shards; give files")
    mine = source.shard(everything, *job.shard) if job.shard else everything
    stamp = _stamp(job, source.stamp(everything))
    with to_ourselves(job.prefix, job.output_key):
        journal = Journal(job.prefix, stamp)
        known = journal.read() if seekable else None
        if known and known.sealed:
            publish(job.prefix)
            journal.remove()
        done = _done(job, stamp) if seekable else _done(job, None)
        if done:
            return done
        facts = _facts(job, stamp, everything)
        run = _Run(job, mine, journal, known, facts, chooser or encode.Chooser(job.tokenizer, bos=job.bos))
        try:
            return run.go()
        except BrokenPipeError:
            raise  # of what is printed: the command's own affair
        except OSError as error:
            raise UsageError(
                f"{job.output_key}={job.prefix}: can't be written: {error.strerror or error}. Nothing has its final "
                "name yet; mend that (space, permissions), and the same command goes on where this one stood"
            ) from None
        except BrokenExecutor:
            raise UsageError(
                f"{job.output_key}={job.prefix}: a worker process was killed, for want of memory perhaps. Take fewer "
                "workers; the same command goes on where this one stood"
            ) from None
        finally:
            run.writer.close()


def _stamp(job: Job, files: str) -> str:
    """Equal for jobs that give equal files, whatever becomes of faults."""
    kind = (job.tokenizer.type, job.tokenizer.fingerprint, job.bos, job.append_eod)
    facts = [SIDECAR_FORMAT, files, kind, job.key, job.skip_empty, job.limit, job.shard]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _facts(job: Job, stamp: str, everything: Sequence[Source]) -> dict[str, Any]:
    """The sidecar's `source`. `corpus` is the same for all shards, wherever they were made.

    A shard has the stamp of the undivided job as `whole`: its merged output is that job's.
    """
    whole = {"whole": _stamp(replace(job, shard=None), source.stamp(everything))} if job.shard else {}
    return {
        "input": " ".join(job.inputs),
        "stamp": stamp,
        **whole,
        "corpus": source.stamp(everything, times=False),
        "key": job.key,
        "append_eod": job.append_eod,
        "bos": job.bos,
        **({"shard": list(job.shard)} if job.shard else {}),
    }


def made_before(job: Job) -> Summary | None:
    """The summary of what this very job made earlier; None where it is yet to be made.

    Raises UsageError where other output is there and may not be replaced.
    """
    return _done(job, _stamp(job, source.stamp(source.find(job.inputs, job.input_key))))


def _done(job: Job, stamp: str | None) -> Summary | None:
    """The summary of finished output of this `stamp`. Raises UsageError where other data would be replaced."""
    if not Path(f"{job.prefix}.idx").exists():
        return None
    sidecar = read_sidecar(job.prefix)
    if sidecar is not None and stamp is not None and sidecar["source"].get("stamp") == stamp:
        try:
            if sidecar["tokens"]:
                open_index(job.prefix)
        except UsageError:
            return None
        counts = {name: sidecar[name] for name in ("documents", "tokens", "bytes", "skipped", "seconds", "checksum")}
        return Summary(job.prefix, **counts, passed_over=0, encoder=sidecar["encoder"], made=False)
    refuse_other(job)
    return None


def refuse_other(job: Job) -> None:
    """Raise UsageError where the job's output is there, made from something else, and may not be replaced."""
    if job.overwrite or not Path(f"{job.prefix}.idx").exists():
        return
    sidecar = read_sidecar(job.prefix)
    of = "by another program"
    if sidecar is not None:
        of = f"from {sidecar['source'].get('input')} with {sidecar['tokenizer']['model']}"
    raise UsageError(
        f"{job.output_key}={job.prefix}: {Path(job.prefix).name} is there already, made {of}. "
        f"Give another {job.output_key}, or {job.overwrite_flag} to replace it"
    )


class _Run:
    """One run from the state that it finds to the finished files."""

    def __init__(
        self,
        job: Job,
        sources: list[Source],
        journal: Journal,
        state: State | None,
        facts: dict[str, Any],
        chooser: encode.Chooser,
    ) -> None:
        self.job, self.sources, self.journal, self.facts, self.chooser = job, sources, journal, facts, chooser
        self.state, self.digest = self._resumed(state)
        self.writer = IndexedWriter(job.prefix, job.tokenizer.vocab_size, self.state.tokens, self.state.documents)
        self.began = time.monotonic() - self.state.seconds
        self.encoder = "none was needed"

    def _resumed(self, state: State | None) -> tuple[State, Any]:
        dtype = token_dtype(self.job.tokenizer.vocab_size)
        if state is not None and not state.sealed:
            digest = self.journal.verify(state, dtype.itemsize)
            if digest is not None:
                print(f"{self.job.prefix}: going on after {state.documents:,} documents of an earlier run", flush=True)
                return state, digest
            print(f"{self.job.prefix}: what an earlier run left is damaged; starting anew", flush=True)
        if state is None and self.journal.documents():
            print(
                f"{self.job.prefix}: an unfinished run of another text or other settings ({self.journal.documents():,} "
                "documents) is replaced",
                flush=True,
            )
        self.journal.remove(output=True)
        return State(), hashlib.sha256()

    def go(self) -> Summary:
        try:
            self._encode_all()
        except (UsageError, KeyboardInterrupt):
            with suppress(OSError):
                self._commit()
            raise
        if not self.state.documents and not self.job.shard:
            self.journal.remove(output=True)
            skipped = f" ({self.state.skipped:,} lines were skipped)" if self.state.skipped else ""
            raise TextFault(
                f"{self.job.input_key}={' '.join(self.job.inputs)}: holds no text{skipped}. Give JSON Lines with the "
                f"key `{self.job.key}`, or Parquet with that column"
            )
        return self._finish()

    def _encode_all(self) -> None:
        job = self.job
        chunks = self._chunks()
        peeked: list[Chunk] = []
        texts: list[str] = []
        while not texts and len(peeked) < MOST_PEEKED and (first := next(chunks, None)):
            peeked.append(first)
            texts, _ = documents.texts(first.payload, job.key)
        if not peeked or job.limit == 0:
            return
        choice, encoder = self.chooser.choose(texts)
        self.encoder = choice.why
        if not choice.fast:
            print(f"{job.prefix}: the ordinary tokenizer is used: {choice.why}", flush=True)
        progress = Progress(self.sources, self.state)
        last_commit = time.monotonic()
        task = Task(job.key, job.tokenizer.eod if job.append_eod else None, job.skip_empty, job.tokenizer.vocab_size)
        pool, submit = workers.pool(job.workers, task, choice, encoder)
        running: deque[tuple[Chunk, int, Future[Result]]] = deque()
        in_flight = 0
        try:
            for chunk in itertools.chain(peeked, chunks, (None,)):
                size = max(len(chunk.payload), job.chunk) if chunk else 0
                # No more than two chunks wait; and a document as long as several chunks is encoded with few beside it.
                while running and (chunk is None or in_flight + size > (job.workers + 2) * job.chunk):
                    done, freed, future = running.popleft()
                    in_flight -= freed
                    if not self._take(done, future.result()):
                        return
                    progress.show(done, self.state)
                    if time.monotonic() - last_commit >= job.commit:
                        self._commit()
                        last_commit = time.monotonic()
                if chunk:
                    running.append((chunk._replace(payload=b""), size, submit(chunk.payload)))
                    in_flight += size
        finally:
            pool.shutdown(cancel_futures=True)

    def _chunks(self) -> Iterator[Chunk]:
        for number in range(self.state.source, len(self.sources)):
            position = self.state.position if number == self.state.source else 0
            yield from source.read(number, self.sources[number], position, self.job.key, self.job.chunk)

    def _take(self, chunk: Chunk, result: Result) -> bool:
        """Write a chunk's documents. False where the limit has been reached."""
        for fault in result.faults:
            self._fault(chunk, fault.line, fault.why)
        if chunk.fault is not None:
            self._broken_file(chunk)
        ids, lengths, sizes = result.ids, result.lengths, result.sizes
        more = True
        if self.job.limit is not None and len(sizes):
            enough = int(np.searchsorted(np.cumsum(sizes), self.job.limit - self.state.bytes)) + 1
            more = enough > len(sizes)
            lengths, sizes = lengths[:enough], sizes[:enough]
            ids = ids[: int(lengths.sum(dtype=np.int64))]
        self.writer.add(ids, lengths)
        self.digest.update(np.ascontiguousarray(ids).data)
        state = self.state
        state.documents, state.tokens = self.writer.documents, self.writer.tokens
        state.bytes += int(sizes.sum())
        state.source, state.position = chunk.source, chunk.position
        if chunk.fault is not None:
            state.source, state.position = chunk.source + 1, 0
        return more

    def _fault(self, chunk: Chunk, line: int, why: str) -> None:
        """Stop at a line without a document, or count it. Its number may cost reading the file up to it."""
        file = self.sources[chunk.source]
        if self.job.on_error == "stop" or len(self.state.shown) < SHOWN_FAULTS:
            number = source.lines_before(file, chunk.begin) + chunk.line + line + 1
            what = f'{file.path}: line {number:,} is not {{"{self.job.key}": "…"}}: {why}'
            self._stop(what, "Mend or remove the line")
            self._show(what)
        self.state.skipped += 1

    def _broken_file(self, chunk: Chunk) -> None:
        file = self.sources[chunk.source]
        if file.kind == "text" and file.optional:
            self.state.passed_over += 1
            return
        where = ""
        way_out = "Give UTF-8 text, JSON Lines, or a folder of them" if file.kind == "text" else "Get the file again"
        if file.kind not in ("text", "parquet"):
            where = f", after line {source.lines_before(file, chunk.begin) + chunk.line:,}"
        self._stop(f"{file.path}: {chunk.fault}{where}", way_out)
        self._show(f"{file.path}: {chunk.fault}{where}; its rest is left out")
        self.state.skipped += 1

    def _stop(self, what: str, way_out: str) -> None:
        if self.job.on_error == "stop":
            skip = f", or give {self.job.skip_flag}: then this run goes on from here" if self.job.skip_flag else ""
            raise TextFault(f"{self.job.input_key}={what}. {way_out}{skip}")

    def _show(self, what: str) -> None:
        self.state.shown.append(what)
        print(f"skipped: {what}", flush=True)
        if len(self.state.shown) == SHOWN_FAULTS:
            print("skipped: more such are counted, not shown", flush=True)

    def _commit(self) -> None:
        self.writer.commit()
        self.state.sha256 = self.digest.hexdigest()
        self.state.seconds = time.monotonic() - self.began
        self.journal.write(self.state)

    def _finish(self) -> Summary:
        state, job = self.state, self.job
        seconds = round(time.monotonic() - self.began, 3)
        counts: dict[str, Any] = {
            "documents": state.documents,
            "tokens": state.tokens,
            "bytes": state.bytes,
            "skipped": state.skipped,
            "seconds": seconds,
            "checksum": f"sha256:{self.digest.hexdigest()}",
        }
        sidecar = {
            "format": SIDECAR_FORMAT,
            "tokenizer": asdict(job.recorded or _by_path(job.tokenizer)),
            **counts,
            "faults": state.shown,
            "encoder": self.encoder,
            "source": self.facts,
        }
        self.writer.seal(sidecar)
        state.sealed = True
        self._commit_sealed()
        publish(job.prefix)
        self.journal.remove()
        return Summary(job.prefix, **counts, passed_over=state.passed_over, encoder=self.encoder, made=True)

    def _commit_sealed(self) -> None:
        self.state.sha256 = self.digest.hexdigest()
        self.journal.write(self.state)


def _by_path(info: TokenizerInfo) -> TokenizerInfo:
    return info if is_hub_name(info.model) else replace(info, model=str(Path(info.model).expanduser().resolve()))
