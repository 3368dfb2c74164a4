"""Checkpoints in remote stores (s3://, gs://, any fsspec address): sent in the background, fetched on a bare machine.

`listing` says what a store holds, `fetch` brings a checkpoint into a folder, `faults` verifies one where it lies, and
`remove` deletes some. A run's side is in resume.py (what it goes on from) and uploader.py (starts the process send.py).
"""

from megatron_rocm.checkpoint.remote.fetching import faults, fetch
from megatron_rocm.checkpoint.remote.held import Held, listing
from megatron_rocm.checkpoint.remote.retain import remove

__all__ = ["Held", "faults", "fetch", "listing", "remove"]
