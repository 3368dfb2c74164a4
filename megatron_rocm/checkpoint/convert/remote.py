"""A checkpoint in a remote store as the source of a conversion: of its files, those that hold weights are fetched."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_rocm.checkpoint.convert.from_megatron import FromMegatron
from megatron_rocm.checkpoint.convert.huggingface import ALL_FILES
from megatron_rocm.checkpoint.convert.to_megatron import DESCRIPTION
from megatron_rocm.checkpoint.folder import WHOLE
from megatron_rocm.checkpoint.remote.fetching import fetch, patiently
from megatron_rocm.checkpoint.remote.held import newest, split
from megatron_rocm.checkpoint.remote.store import Store
from megatron_rocm.config.address import checked
from megatron_rocm.errors import UsageError

DESCRIBING = (WHOLE, ".metadata", "common.pt")


@contextmanager
def fetched(address: str, iteration: int | None, beside: Path, tokenizer: str | None) -> Iterator[FromMegatron]:
    """The checkpoint at an address, its weights in a folder beside the destination until the block ends.

    Raises UsageError where there is none, and where the store does not answer.
    """
    address = checked("SRC", address)
    root, own = split(address)
    number = iteration if iteration is not None else own
    if number is None:  # once, as training may send another meanwhile
        found = patiently(lambda: newest(Store(root)), print)
        if not found:
            raise UsageError(f"{address}: holds no whole checkpoint")
        number = found[0]
    try:
        beside.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{beside.name}.fetched-", dir=beside.parent))
    except OSError as error:
        raise UsageError(f"{beside}: can't be written ({error}); choose another folder") from error
    try:
        names = [*DESCRIBING, *(f"{DESCRIPTION}/{name}" for name in ALL_FILES)]
        fetch(root, number, folder, names)
        source = FromMegatron(folder, tokenizer=tokenizer)
        fetch(root, number, folder, sorted(source.files))
        yield source
    finally:
        shutil.rmtree(folder, ignore_errors=True)
