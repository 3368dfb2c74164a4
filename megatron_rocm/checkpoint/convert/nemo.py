"""The command lines of a NeMo guide's convert_from_hf_to_nemo2.py and convert_from_nemo2_to_hf.py, over ours.

What they write and read here is a checkpoint that our training loads, not NeMo's own folder of `context` and `weights`.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from megatron_rocm.checkpoint.convert.command import convert
from megatron_rocm.config.presets import PRESETS
from megatron_rocm.errors import UsageError

MODELS = ("LlamaModel",)
# NeMo's names of configurations, as nemo.collections.llm has them → our presets, and whether RoPE is scaled.
CONFIGS = {
    "Llama2Config7B": ("llama2", "7", False), "Llama2Config13B": ("llama2", "13", False),
    "Llama2Config70B": ("llama2", "70", False), "CodeLlamaConfig7B": ("llama2", "code7", False),
    "CodeLlamaConfig13B": ("llama2", "code13", False), "CodeLlamaConfig34B": ("llama2", "code34", False),
    "Llama3Config8B": ("llama3", "8", False), "Llama3Config70B": ("llama3", "70", False),
    "Llama31Config8B": ("llama3", "8", True), "Llama31Config70B": ("llama3", "70", True),
    "Llama31Config405B": ("llama3", "405", True), "Llama32Config1B": ("llama3", "1", True),
    "Llama32Config3B": ("llama3", "3", True),
}  # fmt: skip


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message}; --help shows the usage")


def _parser(name: str, source: str, output: str) -> argparse.ArgumentParser:
    parser = _Parser(prog=name)
    parser.add_argument("--source", required=True, help=source)
    parser.add_argument("--output-path", required=True, help=output)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output of the same kind")
    return parser


def hf_to_nemo2(argv: Sequence[str]) -> int:
    """Hugging Face → checkpoint. Returns the exit status. Raises UsageError."""
    parser = _parser(
        "convert_from_hf_to_nemo2.py", "a Hugging Face model folder", "the folder for LOAD_CKPT_PATH to make"
    )
    parser.add_argument("--model-name", choices=MODELS, metavar="NAME", help=", ".join(MODELS))
    parser.add_argument("--model-config-name", metavar="NAME", help=", ".join(CONFIGS))
    args = parser.parse_args(argv)
    if args.model_config_name:
        _require(args.model_config_name, Path(args.source))
    return convert("huggingface", args.source, "megatron", args.output_path, overwrite=args.overwrite)


def nemo2_to_hf(argv: Sequence[str]) -> int:
    """Checkpoint → Hugging Face. Returns the exit status. Raises UsageError."""
    parser = _parser(
        "convert_from_nemo2_to_hf.py", "SAVE_CKPT_PATH of a run, or a converted checkpoint", "the folder to make"
    )
    args = parser.parse_args(argv)
    if (Path(args.source) / "weights").is_dir():
        raise UsageError(
            f"--source {args.source}: is NeMo's own checkpoint, which is not read here; export it with NeMo"
        )
    return convert("megatron", args.source, "huggingface", args.output_path, overwrite=args.overwrite)


def _require(name: str, source: Path) -> None:
    """Raise UsageError unless the folder's model is the one that NeMo calls `name`."""
    from megatron_rocm.checkpoint.convert.huggingface import CONFIG, SHAPE, model_of, read_config

    if name not in CONFIGS:
        near = difflib.get_close_matches(name, CONFIGS, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(CONFIGS)}"
        raise UsageError(f"--model-config-name {name}: no configuration of a Llama is called so; {hint}")
    family, size, scaled = CONFIGS[name]
    preset, model = PRESETS[family, size], model_of(read_config(source), source / CONFIG)
    wrong = [f"{key} {getattr(model, key)} instead of {getattr(preset, key)}" for key in SHAPE
             if getattr(model, key) != getattr(preset, key)]  # fmt: skip
    if not wrong and model.rope_scaling != scaled:
        wrong = [f"RoPE scaling {'on' if model.rope_scaling else 'off'}"]
    if wrong:
        raise UsageError(f"--model-config-name {name}: {source} holds another model: {', '.join(wrong)}")
