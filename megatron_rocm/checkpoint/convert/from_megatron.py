"""A checkpoint of a run, in whatever layout it trained, or a converted one, as the source of a conversion.

The run may have been Megatron-LM's own.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rocm.checkpoint import megatron_lm
from megatron_rocm.checkpoint.choose import RELEASE
from megatron_rocm.checkpoint.convert import huggingface
from megatron_rocm.checkpoint.convert.table import ROWS, Weight, weights
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
    if iteration is None and (root / RELEASE / WHOLE).is_file():
        return root / RELEASE  # Megatron-LM's tracker names no iteration then
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
    """The weights in one `iter_…` folder. A Source. `run` is None where no run of ours has made it."""

    def __init__(
        self, checkpoint_dir: str | Path, iteration: int | None = None, *, tokenizer: str | None = None
    ) -> None:
        """Megatron-LM's checkpoints don't tell which rows of the embedding pad it: those beyond `tokenizer`'s ids.

        Raises UsageError for a source that is none, and where it does not hold the configuration of a run.
        """
        self.folder = iteration_folder(checkpoint_dir, iteration)
        self._checkpoint = TorchDist(self.folder)
        self.model, self.run = self._configuration(tokenizer)

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
        eos = self.run.data.eod if self.run else None
        if self.run and (tokenizer or self.run.data.tokenizer_model):
            bos, copied = huggingface.copy_tokenizer(self.run, tokenizer, folder), True
        elif tokenizer and not origin:
            huggingface.copy_tokenizer_files(Path(tokenizer), folder)
            told = huggingface.tokenizer_info(tokenizer)
            bos, eos = told.bos, told.eod
        if origin:
            if not copied:
                huggingface.copy_tokenizer_files(Path(tokenizer) if tokenizer else origin, folder)
            huggingface.copy_description(origin, folder, huggingface.read_config(origin), dtype)
            return
        name = str(dtype).removeprefix("torch.")
        config = huggingface.llama_config(self.model, dtype=name, bos=bos, eos=eos)
        huggingface.write_json(folder / huggingface.CONFIG, config)
        huggingface.write_json(folder / huggingface.GENERATION, huggingface.generation_config(bos, eos))

    def _origin(self) -> Path | None:
        """The description that a converted checkpoint has with it: this one, or the one its run began from."""
        if self.run is None:
            there = self.folder / DESCRIPTION
            return there if there.is_dir() else None
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

    def _configuration(self, tokenizer: str | None) -> tuple[Model, RunConfig | None]:
        common = read_common(self.folder)
        try:
            if isinstance(args := common.get("args"), Namespace) and "run" not in common:
                return self._of_megatron_lm(args, tokenizer), None
            if common.get("weights_only"):
                return Model.model_validate(common["run"]["model"]), None
            run = RunConfig.model_validate({**common["run"], "launch": NO_LAUNCH})
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            raise UsageError(
                f"{self.folder / 'common.pt'}: does not hold the configuration of a run ({huggingface.reason(error)})"
            ) from error
        return run.model, run

    def _of_megatron_lm(self, args: Namespace, tokenizer: str | None) -> Model:
        rows = self._checkpoint.rows(ROWS[0].megatron)
        ids = huggingface.tokenizer_info(tokenizer).vocab_size if tokenizer else rows
        if ids > rows:
            raise UsageError(f"--tokenizer {tokenizer}: has {ids:,} ids; {self.folder} has rows for {rows:,}")
        shape = megatron_lm.configuration(args, self.folder)["model"]
        scaled = shape.pop("rope_scaling", False)
        factor = float(getattr(args, "rope_scaling_factor", 8.0)) if scaled else None
        rest = {
            "max_position_embeddings": getattr(args, "max_position_embeddings", None) or args.seq_length,
            "init_std": getattr(args, "init_method_std", 0.02),
        }
        model = huggingface.with_names({**shape, **rest, "vocab_size": ids, "rope_scaling_factor": factor})
        return model.model_copy(update={"padded_vocab_size": rows})


def _computed(model: Model) -> dict[str, Any]:
    return model.model_dump(exclude=MAY_DIFFER)
