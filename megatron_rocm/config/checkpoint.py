"""The schema's checkpoint section: what is saved where and when, and what a run starts from."""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import BeforeValidator, Field

from megatron_rocm.config.address import is_remote, local_name
from megatron_rocm.config.variable import MOST, OURS, REPAIRED, Section, var


class Checkpoint(Section):
    save: str | None = var(
        "SAVE_CKPT_PATH", None, "folder for checkpoints, or s3://bucket/path and the like; a run resumes from what it finds there",
        text="nothing is saved", state=REPAIRED,
        note="holds optimizer, scheduler, RNG and data position too, so that resume is exact",
    )  # fmt: skip
    load: str | None = var(
        "LOAD_CKPT_PATH", None, "checkpoint folder or address to start from where SAVE_CKPT_PATH holds none", text="none",
        state=REPAIRED, note="loads the whole state; the guide's scripts drop optimizer and RNG. Megatron-LM's torch_dist checkpoints too",
    )  # fmt: skip
    local: str | None = var(
        "LOCAL_CKPT_PATH", None, "with s3:// and the like: folder on each node where checkpoints are written before they are "
        "sent, and fetched to", text="checkpoints/s3/<bucket>/<path> in the current folder", state=OURS,
    )  # fmt: skip
    upload_timeout: int = var(
        "UPLOAD_TIMEOUT", 1800, "seconds that sending to s3:// and the like may go on after the end of the run", state=OURS,
        ge=0, le=MOST,
    )  # fmt: skip
    finetune: bool = var(
        "FINETUNE", False, "take weights alone from LOAD_CKPT_PATH and begin at iteration 0 with a new optimizer, schedule and "
        "data position; later starts resume from SAVE_CKPT_PATH", state=OURS, note="Megatron-LM's --finetune",
    )  # fmt: skip
    no_load_optim: bool = var(
        "NO_LOAD_OPTIM", False, "take all but the optimizer's state from LOAD_CKPT_PATH; it begins anew", state=OURS,
        note="Megatron-LM's --no-load-optim",
    )  # fmt: skip
    allow_change: tuple[str, ...] = var(
        "ALLOW_CHANGE", (), "variables that may differ from the checkpoint's: those that docs/changes.md says need a word",
        text="none", values="variables separated by commas", state=OURS,
    )  # fmt: skip
    # Text, whatever it was typed or stored as: steps, or minutes with an `m`.
    save_interval: Annotated[str, BeforeValidator(str), Field(pattern=r"^[1-9]\d{0,8}m?$")] = var(
        "SAVE_INTERVAL", "5000", "steps between checkpoints, or minutes: `30m`",
        values="a whole number of steps, or of minutes followed by `m`, of at least 1",
        note="minutes are ours; rank 0's clock decides",
    )  # fmt: skip
    async_save: bool = var(
        "ASYNC_SAVE", True, "write checkpoints while training goes on; 0: training waits until they are on disk",
        state=OURS, note="training waits for the copy to host memory alone (Megatron-LM's --async-save)",
    )  # fmt: skip
    keep_last: int = var(
        "SAVE_KEEP_LAST", 0, "checkpoints to keep, the newest ones; 0: all", state=OURS, ge=0, le=MOST,
    )  # fmt: skip
    keep_every: int = var(
        "SAVE_KEEP_EVERY", 0, "with SAVE_KEEP_LAST: keep besides those whose step is a multiple of this; 0: none", state=OURS,
        ge=0, le=MOST,
    )  # fmt: skip
    exit_duration: float | None = var(
        "EXIT_DURATION", None, "minutes after its start at which the run saves and ends", text="none", state=OURS,
        note="Megatron-LM's --exit-duration-in-mins", gt=0, le=MOST,
    )  # fmt: skip
    save_timeout: int = var(
        "SAVE_TIMEOUT", 1800, "seconds after which a save that hangs ends the run", state=OURS, ge=1, le=MOST
    )

    @property
    def folder(self) -> str | None:
        """Where checkpoints are written: SAVE_CKPT_PATH, or where that is remote the folder of its local copies."""
        return self._here(self.save, "") if is_remote(self.save) else self.save

    @property
    def source(self) -> str | None:
        """The folder of LOAD_CKPT_PATH, or where that is remote the folder that it is fetched into."""
        return self._here(self.load, "loaded") if is_remote(self.load) else self.load

    def _here(self, address: str | None, part: str) -> str:
        name = local_name(str(address))
        if self.local:
            return os.path.join(self.local, part, name) if part else self.local
        return os.path.join("checkpoints", part, name)

    @property
    def save_steps(self) -> int:
        """Steps between checkpoints; 0 where the interval is one of time."""
        return 0 if self.save_interval.endswith("m") else int(self.save_interval)

    @property
    def save_seconds(self) -> float:
        """Seconds between checkpoints; 0 where the interval is one of steps."""
        return 60.0 * int(self.save_interval[:-1]) if self.save_interval.endswith("m") else 0.0
