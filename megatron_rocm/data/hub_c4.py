"""C4's raw files from the hub: by shards, in parallel, each gone on with where it stood and checked by its SHA-256."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_rocm.data import c4
from megatron_rocm.data.download import download, verify
from megatron_rocm.data.hub_datasets import commit_of, explain
from megatron_rocm.data.side_by_side import side_by_side
from megatron_rocm.errors import UsageError

REPO, FOLDER = "allenai/c4", "en"
DOWNLOADS = 4  # at a time
STATE_FORMAT = 1


@dataclass(frozen=True)
class _RawFile:
    """One of C4's files as the hub announces it; `sha256` is that of its bytes."""

    name: str
    size: int
    sha256: str


def fetch_c4(shards: Sequence[int], validation: bool, folder: Path, revision: str, check: bool) -> list[Path]:
    """Have C4's training files `shards`, and with `validation` the others, in `folder`/en; the former, in order.

    Sizes and checksums are the hub's; files that are there are read again with `check`. Raises UsageError.
    """
    train = [c4.train_file(number) for number in shards]
    names = [*train, *(c4.validation_file(number) for number in range(c4.VALIDATION_FILES) if validation)]
    folder = folder / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    commit, files = _announced(folder, revision, names)
    missing = [file for file in files if not (folder / file.name).exists()]
    size, free = sum(file.size for file in missing), shutil.disk_usage(folder).free
    if size > free:
        raise UsageError(
            f"SHARDS: {len(missing):,} files of {size / 1e9:,.1f} GB in all are to come, and {folder} has "
            f"{free / 1e9:,.1f} GB free. Give a larger DATA_DIR, or fewer shards"
        )
    if missing:
        print(f"{folder}: {len(missing):,} of {len(files):,} files to download, {size / 1e9:,.1f} GB", flush=True)

    def get(file: _RawFile) -> None:
        from huggingface_hub import get_token, hf_hub_url

        path, digest = folder / file.name, f"sha256:{file.sha256}"
        token = get_token()
        url = hf_hub_url(REPO, f"{FOLDER}/{file.name}", repo_type="dataset", revision=commit)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        if not download(url, path, size=file.size, digest=digest, headers=headers) and check:
            verify(path, digest)

    side_by_side([partial(get, file) for file in files], DOWNLOADS)
    print(
        f"{folder}: {len(files):,} files, {sum(file.size for file in files):,} bytes, as {commit} has them", flush=True
    )
    return [folder / name for name in train]


def _announced(folder: Path, revision: str, names: list[str]) -> tuple[str, list[_RawFile]]:
    """The commit and what it says of these files; what is known already is not asked for again."""
    notes = folder / ".hub.json"
    known: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        known = json.loads(notes.read_bytes())
    if known.get("format") != STATE_FORMAT or known["revision"] != revision:
        known = {"format": STATE_FORMAT, "revision": revision, "commit": commit_of(REPO, revision), "files": {}}
    unknown = [name for name in names if name not in known["files"]]
    for at in range(0, len(unknown), 100):
        known["files"].update(_ask(unknown[at : at + 100], known["commit"]))
    lost = [name for name in names if name not in known["files"]]
    if lost:
        raise UsageError(f"REVISION={revision}: {REPO} has no {FOLDER}/{lost[0]} there. Leave REVISION out")
    if unknown:
        fresh = notes.with_name(".hub.json.partial")
        fresh.write_text(json.dumps(known) + "\n")
        os.replace(fresh, notes)
    return known["commit"], [_RawFile(**known["files"][name]) for name in names]


def _ask(names: list[str], commit: str) -> dict[str, dict[str, Any]]:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    paths = [f"{FOLDER}/{name}" for name in names]
    try:
        entries = HfApi().get_paths_info(REPO, paths, revision=commit, repo_type="dataset")
    except Exception as error:
        raise UsageError(explain(REPO, error)) from None
    files = [
        _RawFile(entry.path.rpartition("/")[2], entry.size, entry.lfs.sha256)
        for entry in entries
        if isinstance(entry, RepoFile) and entry.lfs is not None
    ]
    return {file.name: asdict(file) for file in files}
