"""The command line of Llemma's convert_raw_llama_weights_to_hf.py: Meta's Code Llama → what its training starts from.

Llemma's README calls the result "NeoX format": the folder that the configuration's `load` names. Here that is a
checkpoint without a layout, which training loads with any model_parallel_size. A Hugging Face folder, which the name
promises, is what `megatron-rocm convert meta-to-hf` makes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from megatron_rocm.errors import UsageError

# Key of the GPT-NeoX configuration → field of our model section.
KEYS = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_kv_heads": "num_query_groups",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"convert_raw_llama_weights_to_hf.py: {message}; --help shows the usage")


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 1 where both sides differ. Raises UsageError."""
    parser = _Parser(prog="convert_raw_llama_weights_to_hf.py", description=__doc__)
    parser.add_argument("--input_dir", required=True, help="Meta's folder, of one size or with 7B, 34B … in it")
    parser.add_argument("--config_file", required=True, help="GPT-NeoX configuration (YAML) of the model")
    parser.add_argument("--output_dir", required=True, help="the folder to make, for the configuration's `load`")
    parser.add_argument(
        "--num_output_shards", type=int, default=1, metavar="N",
        help="model_parallel_size of the training (default: 1); checked, but the checkpoint is for any",
    )  # fmt: skip
    args = parser.parse_args(argv)
    config = _read(Path(args.config_file))
    folder = _folder(Path(args.input_dir), config, args.config_file)

    from megatron_rocm.checkpoint.convert.command import finish
    from megatron_rocm.checkpoint.convert.from_meta import FromMeta

    source = FromMeta(folder)
    shards, model = args.num_output_shards, source.model
    if shards < 1 or model.num_attention_heads % shards or model.num_query_groups % shards:
        raise UsageError(
            f"--num_output_shards {shards}: {model.num_attention_heads} heads in {model.num_query_groups} groups are "
            "not cut into so many"
        )
    wrong = [
        f"{key} {config[key]} there, {getattr(model, field)} here"
        for key, field in KEYS.items()
        if key in config and config[key] != getattr(model, field)
    ]
    if wrong:
        raise UsageError(f"--config_file {args.config_file}: is of another model than {folder}: {', '.join(wrong)}")
    base = config.get("rotary_emb_base", model.rotary_base)
    if base != model.rotary_base:
        print(
            f"rotary_emb_base is {base} in {args.config_file}, {model.rotary_base} in Meta's params.json: "
            f"{base} is taken"
        )
        source.model = model.model_copy(update={"rotary_base": base})
    return finish(source, "megatron", args.output_dir)


def _read(path: Path) -> dict[str, Any]:
    """A GPT-NeoX configuration's keys, with `_` for `-`."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UsageError(f"--config_file {path}: can't be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config_file {path}: is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UsageError(f"--config_file {path}: has no keys")
    return {str(key).replace("-", "_"): value for key, value in content.items()}


def _folder(root: Path, config: dict[str, Any], where: str) -> Path:
    """The folder of the size that the configuration is of: `root`, or one in it."""
    from megatron_rocm.checkpoint.convert.from_meta import PARAMS, read_params

    folders = [path.parent for path in (root / PARAMS, *sorted(root.glob(f"*/{PARAMS}"))) if path.is_file()]
    if not folders:
        raise UsageError(f"--input_dir {root}: no {PARAMS}, neither here nor in a folder of one size such as 7B")
    wanted = (config.get("num_layers"), config.get("hidden_size"))
    fitting = [path for path in folders if (read_params(path).get("n_layers"), read_params(path).get("dim")) == wanted]
    if len(fitting) != 1:
        there = ", ".join(str(path) for path in fitting or folders)
        raise UsageError(
            f"--input_dir {root}: {'several' if fitting else 'none'} of {there} with the {wanted[0]} layers of size "
            f"{wanted[1]} that {where} has: name the folder of one size"
        )
    return fitting[0]
