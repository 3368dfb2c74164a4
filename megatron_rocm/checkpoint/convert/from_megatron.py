"""A checkpoint of a run, in whatever layout it trained, or a converted one, as the source of a conversion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rocm.checkpoint.convert import huggingface
from megatron_rocm.checkpoint.convert.table import Weight, weights
from megatron_rocm.checkpoint.convert.to_megatron import DESCRIPTION
from megatron_rocm.checkpoint.convert.torch_dist import TorchDist
from megatron_rocm.checkpoint.folder import TRACKER, WHOLE, checkpoint_path, latest
from megatron_rocm.checkpoint.unpickle import read_common
from megatron_rocm.config.address import is_remote
from megatron_rocm.config.schema import Model, RunConfig
from megatron_rocm.errors import UsageError

NO_LAUNCH = {"master_port": 1, "log_dir": ""}  # a checkpoint does not say from where it was launched
# What a run may have otherwise than the model it began from.
MAY_DIFFER = {"size", "title", "padded_vocab_size", "max_position_embeddings", "init_std"}


def iteration_folder(checkpoint_dir: str | Path, iteration: int | None = None) -> Path:
    """The `iter_…` folder of an iteration, the latest by default; such a folder itself is taken as it is.

    Raises UsageError, naming the iterations that are there.
    """
    root = Path(checkpoint_dir)
    if iteration is None and (root / WHOLE).is_file():
        return root
    if iteration is None and (path := latest(root)):
        return path
    there = ", ".join(sorted(path.name for path in root.glob("iter_*") if (path / WHOLE).is_file()))
    if not there:
        raise UsageError(f"{root}: no checkpoint here; give the SAVE_CKPT_PATH of a run, which holds iter_… folders")
    if iteration is None:
        raise UsageError(f"{root}: has no {TRACKER}; choose one of {there} with --iteration")
    path = checkpoint_path(root, iteration)
    if not (path / WHOLE).is_file():
        raise UsageError(f"{root}: no checkpoint of iteration {iteration}; there is {there}")
    return path


class FromMegatron:
    """The weights in one `iter_…` folder. A Source. `run` is None of a converted one, which no run has made."""

    def __init__(self, checkpoint_dir: str | Path, iteration: int | None = None) -> None:
        """Raises UsageError for a source that is none, and where it does not hold the configuration of a run."""
        self.folder = iteration_folder(checkpoint_dir, iteration)
        self.model, self.run = _configuration(self.folder)
        self._checkpoint = TorchDist(self.folder)

    @property
    def files(self) -> set[str]:
        """The names of the files that hold weights."""
        return self._checkpoint.files(weights(self.model))

    def dtype(self, weight: Weight) -> torch.dtype:
        return self._checkpoint.dtype(weight)

    def tensors(self, weight: Weight) -> dict[str, Tensor]:
        try:
            return weight.to_hugging_face(self._checkpoint.read(weight), self.model)
        except ValueError as error:
            raise UsageError(f"{self.folder}: {error}: not of the model it is said to be of") from error

    def ahead(self, weight: Weight) -> None:
        self._checkpoint.ahead(weight)

    def describe(self, folder: Path, tokenizer: str | None, dtype: torch.dtype) -> None:
        """As the model came that this one began from; else what its run says."""
        origin = self._origin()
        bos, copied = None, False
        if self.run and (tokenizer or self.run.data.tokenizer_model):
            bos, copied = huggingface.copy_tokenizer(self.run, tokenizer, folder), True
        if origin:
            if not copied:
                huggingface.copy_tokenizer_files(Path(tokenizer) if tokenizer else origin, folder)
            huggingface.copy_description(origin, folder, huggingface.read_config(origin), dtype)
            return
        assert self.run  # what has none has an origin
        eos, name = self.run.data.eod, str(dtype).removeprefix("torch.")
        config = huggingface.llama_config(self.model, dtype=name, bos=bos, eos=eos)
        huggingface.write_json(folder / huggingface.CONFIG, config)
        huggingface.write_json(folder / huggingface.GENERATION, huggingface.generation_config(bos, eos))

    def _origin(self) -> Path | None:
        """The description that a converted checkpoint has with it: this one, or the one its run began from."""
        if self.run is None:
            return self.folder / DESCRIPTION
        began = self.run.checkpoint.load
        if not began or is_remote(began):
            return None
        try:
            folder = iteration_folder(began) / DESCRIPTION
            config = huggingface.read_config(folder)
            same = _computed(huggingface.model_of(config, folder)) == _computed(self.model)
        except UsageError:  # it is gone, or no converted one
            return None
        return folder if same else None


def _computed(model: Model) -> dict[str, Any]:
    return model.model_dump(exclude=MAY_DIFFER)


def _configuration(folder: Path) -> tuple[Model, RunConfig | None]:
    common = read_common(folder)
    try:
        if common.get("weights_only"):
            return Model.model_validate(common["run"]["model"]), None
        run = RunConfig.model_validate({**common["run"], "launch": NO_LAUNCH})
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{folder / 'common.pt'}: does not hold the configuration of a run of megatron-rocm "
            f"({type(error).__name__}: {error})"
        ) from error
    return run.model, run
