"""Data sets of the Hugging Face hub as files on this machine's disk: text streamed to JSON Lines, or C4's raw files.

Every set here is plain files at some revision: `datasets` runs no loading scripts. A revision is resolved to its commit
once and recorded, so that a second call goes on with the same files whatever has been uploaded since.
"""

from __future__ import annotations

import fnmatch
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_rocm.data.hub import EXPLANATIONS
from megatron_rocm.errors import UsageError
from megatron_rocm.platform.disk import sync_folder

SHARD_BYTES = 64 << 20  # of text; what a killed run loses at most
SAY_EVERY = 10.0  # seconds
STATE_FORMAT = 1


@dataclass(frozen=True)
class HubSet:
    """A data set's place on the hub. `files` is a pattern of Parquet files, with {config} where that goes."""

    repo: str
    config: str
    revision: str
    files: str
    key: str = "text"


HUB_SETS = {
    # The repository itself has a loading script only; the hub keeps a Parquet copy of every such set at this revision.
    "bookcorpus": HubSet("bookcorpus/bookcorpus", "plain_text", "refs/convert/parquet", "{config}/*train/*.parquet"),
    "wiki": HubSet("wikimedia/wikipedia", "20231101.en", "main", "{config}/train-*.parquet"),
    "fineweb": HubSet("HuggingFaceFW/fineweb", "sample-10BT", "main", "{config}/*.parquet"),
}
# FineWeb's configurations by their folders; all others are the name of a crawl.
FINEWEB_FOLDERS = {"default": "data/*", **{f"sample-{size}": f"sample/{size}" for size in ("10BT", "100BT", "350BT")}}


@dataclass(frozen=True)
class Wanted:
    """What was asked for. `limit` is in bytes of text; `shards` are C4's training files, `validation` its others."""

    dataset: str
    config: str = ""
    revision: str = ""
    limit: int | None = None
    documents: int | None = None
    shards: tuple[int, ...] = ()
    validation: bool = False
    verify: bool = False


def fetch(wanted: Wanted, folder: Path) -> list[Path]:
    """Have the data set under `folder`, or what is still missing of it; the files of text for training, in order.

    Raises UsageError for an unreachable hub, a wrong name, a full disk, and for a folder with other text in it.
    """
    try:
        if wanted.dataset == "c4":
            from megatron_rocm.data.hub_c4 import fetch_c4

            return fetch_c4(wanted.shards, wanted.validation, folder, wanted.revision or "main", wanted.verify)
        return _Stream(wanted, folder / "text").run()
    except OSError as error:
        if error.errno is None:
            raise
        raise UsageError(
            f"DATA_DIR={folder}: can't be written ({error.strerror}). Check space and permissions; the same command "
            "then goes on where it stood"
        ) from None


class _Stream:
    """A hub set's text as JSON Lines in shards, each with its final name only when it is whole.

    `.state.json` beside them holds which ones there are, and where `datasets` goes on after the last.
    """

    def __init__(self, wanted: Wanted, folder: Path) -> None:
        self._wanted, self._folder, self._set = wanted, folder, HUB_SETS[wanted.dataset]
        self._config = wanted.config or self._set.config
        self._revision = wanted.revision or self._set.revision
        self._notes = folder / ".state.json"

    def run(self) -> list[Path]:
        self._folder.mkdir(parents=True, exist_ok=True)
        state = self._known() or {
            "format": STATE_FORMAT,
            "set": self._identity(),
            "commit": commit_of(self._set.repo, self._revision),
            "shards": [],
            "documents": 0,
            "bytes": 0,
            "position": None,
            "ended": False,
        }
        if not self._enough(state):
            self._write_shards(state)
        return [self._folder / name for name in state["shards"]]

    def _identity(self) -> dict[str, str]:
        return {"repo": self._set.repo, "config": self._config, "revision": self._revision}

    def _known(self) -> dict[str, Any] | None:
        try:
            state: dict[str, Any] = json.loads(self._notes.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError:
            raise UsageError(f"{self._notes}: is damaged. Remove the folder {self._folder}") from None
        if state.get("format") != STATE_FORMAT or state["set"] != self._identity():
            raise UsageError(
                f"DATASET={self._wanted.dataset}: {self._folder} holds {' '.join(state.get('set', {}).values())}, and "
                f"{' '.join(self._identity().values())} is asked for. Give another DATA_DIR, or remove that folder"
            )
        if self._wanted.documents is not None and state["documents"] > self._wanted.documents:
            raise UsageError(
                f"MAX_DOCUMENTS={self._wanted.documents}: {self._folder} already holds {state['documents']:,}. Give "
                "another DATA_DIR, or remove that folder"
            )
        missing = [name for name in state["shards"] if not (self._folder / name).is_file()]
        if missing:
            raise UsageError(f"{self._folder / missing[0]}: is gone. Remove the folder {self._folder} to begin anew")
        return state

    def _enough(self, state: dict[str, Any]) -> bool:
        wanted = self._wanted
        enough_bytes = wanted.limit is not None and state["bytes"] >= wanted.limit
        return state["ended"] or enough_bytes or state["documents"] == wanted.documents

    def _write_shards(self, state: dict[str, Any]) -> None:
        stream = _open_stream(self._set, self._config, state["commit"], self._wanted.dataset)
        if state["position"] is not None:
            stream.load_state_dict(state["position"])
        documents = self._documents(stream)
        began, first, said = time.monotonic(), state["bytes"], time.monotonic()
        while not self._enough(state):
            name = f"part-{len(state['shards']):05d}.jsonl"
            partial = self._folder / f".{name}.partial"
            written = 0
            with open(partial, "wb") as file:
                while written < SHARD_BYTES and not self._enough(state):
                    text = next(documents, None)
                    if text is None:
                        state["ended"] = True
                        break
                    file.write(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")
                    size = len(text.encode())
                    written += size
                    state["documents"] += 1
                    state["bytes"] += size
                    if time.monotonic() - said > SAY_EVERY:
                        said = time.monotonic()
                        speed = (state["bytes"] - first) / 1e6 / (said - began)
                        print(
                            f"  {state['documents']:,} documents, {state['bytes'] / 1e6:,.0f} MB, {speed:.1f} MB/s",
                            flush=True,
                        )
                file.flush()
                os.fsync(file.fileno())
            if written:
                os.replace(partial, self._folder / name)
                sync_folder(self._folder)
                state["shards"].append(name)
            else:
                partial.unlink()
            state["position"] = stream.state_dict()
            self._save(state)
        if not state["documents"]:
            raise UsageError(f"DATASET={self._wanted.dataset}: {self._set.repo} at {self._config} holds no text")
        print(f"{self._folder}: {state['documents']:,} documents, {state['bytes']:,} bytes of text", flush=True)

    def _documents(self, stream: Any) -> Iterator[str]:
        try:
            for row in stream:
                if row[self._set.key]:
                    yield row[self._set.key]
        except KeyError:
            raise UsageError(
                f"DATASET={self._wanted.dataset}: the files of {self._set.repo} have no column `{self._set.key}`"
            ) from None
        except Exception as error:  # of the hub's client, of aiohttp, of Arrow: they have no common base
            raise UsageError(explain(self._set.repo, error)) from None

    def _save(self, state: dict[str, Any]) -> None:
        fresh = self._notes.with_name(".state.json.partial")
        with open(fresh, "w") as file:
            json.dump(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, self._notes)
        sync_folder(self._folder)


def _open_stream(hub_set: HubSet, config: str, commit: str, dataset: str) -> Any:
    """An IterableDataset over the set's files, by `datasets`."""
    # It imports torch where it finds one, for which there is no use here: three seconds, and a third of the memory.
    os.environ.setdefault("USE_TORCH", "0")
    try:
        import datasets
    except ImportError:
        raise UsageError(f"DATASET={dataset} is read with datasets: pip install 'megatron-rocm[data]'") from None
    place = FINEWEB_FOLDERS.get(config, f"data/{config}") if dataset == "fineweb" else config
    pattern = hub_set.files.format(config=place)
    names = _names(hub_set.repo, commit, pattern)
    if not names:
        raise UsageError(
            f"CONFIG={config}: {hub_set.repo} has no files {pattern} at {commit}. See its page on the hub for the "
            "configurations that there are"
        )
    files = [f"hf://datasets/{hub_set.repo}@{commit}/{name}" for name in names]
    try:
        return datasets.load_dataset("parquet", data_files=files, split="train", streaming=True, columns=[hub_set.key])
    except Exception as error:
        raise UsageError(explain(hub_set.repo, error)) from None


def _names(repo: str, commit: str, pattern: str) -> list[str]:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError
    from huggingface_hub.hf_api import RepoFile

    folder = pattern[: pattern.index("*")].rpartition("/")[0]
    try:
        tree = HfApi().list_repo_tree(repo, folder, recursive=True, revision=commit, repo_type="dataset")
        names = [entry.path for entry in tree if isinstance(entry, RepoFile)]
    except EntryNotFoundError:
        return []
    except Exception as error:
        raise UsageError(explain(repo, error)) from None
    return sorted(name for name in names if fnmatch.fnmatchcase(name, pattern))


def commit_of(repo: str, revision: str) -> str:
    """The commit that a revision of a data set is now. Raises UsageError."""
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise UsageError("data sets of the hub need huggingface_hub: pip install huggingface_hub") from None
    try:
        commit = HfApi().repo_info(repo, revision=revision, repo_type="dataset", timeout=30).sha
    except Exception as error:
        raise UsageError(explain(repo, error, f" at REVISION={revision}")) from None
    assert commit is not None
    return commit


def explain(repo: str, error: Exception, where: str = "") -> str:
    """What a failure of the hub's client means, in one line."""
    classes = {base.__name__ for base in type(error).__mro__}
    for kind, text in EXPLANATIONS:
        if kind in classes:
            return f"{repo}{where}: {text}"
    if "RevisionNotFoundError" in classes:
        return f"{repo}{where}: there is no such revision. Leave REVISION out, or take one from its page on the hub"
    status = getattr(getattr(error, "response", None), "status_code", None)
    said = f"answered HTTP {status}" if status else f"failed ({type(error).__name__}: {str(error).strip()[:200]})"
    hub = os.environ.get("HF_ENDPOINT") or "the Hugging Face hub"
    return (
        f"{repo}{where}: {hub} {said}. Check the network, HF_ENDPOINT and the proxy; the same command goes on where "
        "this one stood"
    )


def parse(said: dict[str, str], limit: int | None) -> Wanted | None:
    """What prepare_dataset.sh's variables ask the hub for; None for DATASET=local. Raises UsageError."""
    dataset = said["DATASET"]
    if dataset == "local":
        return None
    if dataset != "c4" and dataset not in HUB_SETS:
        raise UsageError(f"DATASET={dataset}: there is local, {', '.join(HUB_SETS)} and c4")
    if said["INPUT"]:
        raise UsageError(
            f"INPUT={said['INPUT']}: belongs to DATASET=local, and DATASET={dataset} is set. Leave one out"
        )
    count = said["MAX_DOCUMENTS"]
    if count and not (count.isascii() and count.isdigit() and int(count[:12]) > 0):
        raise UsageError(f"MAX_DOCUMENTS={count}: must be a whole number above 0")
    if said["VERIFY"] not in ("0", "1"):
        raise UsageError(f"VERIFY={said['VERIFY']}: must be 0 or 1")
    wanted = Wanted(dataset, said["CONFIG"], said["REVISION"], limit, int(count) if count else None)
    if dataset != "c4":
        if said["SHARDS"]:
            raise UsageError(
                f"SHARDS={said['SHARDS']}: belongs to DATASET=c4; MAX_MB or MAX_DOCUMENTS limits {dataset}"
            )
        return wanted
    for name in ("CONFIG", "MAX_DOCUMENTS"):
        if said[name]:
            raise UsageError(f"{name}={said[name]}: DATASET=c4 takes whole files; say which with SHARDS, such as 0-7")
    shards, validation = _c4_shards(said["SHARDS"])
    return replace(wanted, shards=shards, validation=validation, verify=said["VERIFY"] == "1")


def _c4_shards(text: str) -> tuple[tuple[int, ...], bool]:
    from megatron_rocm.data.c4 import TRAIN_FILES

    if not text:
        raise UsageError(
            f"SHARDS is needed: which of C4's {TRAIN_FILES:,} training files (0.3 GB each), such as 0-7 or "
            f"768-{TRAIN_FILES - 1},validation; 0-{TRAIN_FILES - 1} is all of them"
        )
    numbers: set[int] = set()
    for item in text.replace(" ", "").split(","):
        if item == "validation":
            continue
        low, _, high = item.partition("-")
        ends = [low, high or low]
        if not all(end.isascii() and end.isdigit() and int(end[:6]) < TRAIN_FILES for end in ends) or int(
            ends[0]
        ) > int(ends[1]):
            raise UsageError(
                f"SHARDS={text}: must be numbers from 0 to {TRAIN_FILES - 1} and ranges of them, such as 0-7,768, and "
                "the word validation"
            )
        numbers.update(range(int(ends[0]), int(ends[1]) + 1))
    return tuple(sorted(numbers)), "validation" in text
