"""`megatron-rocm convert`: one source, one destination, the same weights."""

from __future__ import annotations

import argparse
import contextlib
import os
import threading
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from megatron_rocm.config.address import is_remote, shown
from megatron_rocm.errors import UsageError

if TYPE_CHECKING:
    from megatron_rocm.checkpoint.convert.source import Source

# Direction → what is read and what is written.
DIRECTIONS = {
    "hf-to-megatron": ("huggingface", "megatron"),
    "megatron-to-hf": ("megatron", "huggingface"),
    "meta-to-megatron": ("meta", "megatron"),
    "meta-to-hf": ("meta", "huggingface"),
}
# Files that hold the first weights of a source, and how many bytes of them to read at once.
FIRST = ("*.safetensors", "consolidated.00.pth", "__0_0.distcp", "iter_*/__0_0.distcp")
EARLY = 4 << 30
EPILOG = """sources and destinations:
  hf        a folder with config.json and safetensors (or pytorch_model.bin), one file or several
  megatron  SAVE_CKPT_PATH of a run, an iter_… folder in it, or a remote address of them; as destination a folder for
            LOAD_CKPT_PATH, from which training starts in any layout (TP, PP, FSDP …)
  meta      a folder with params.json and consolidated.*.pth"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"convert: {message}; `megatron-rocm convert --help` shows the usage")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="megatron-rocm convert",
        description="Convert Llama's weights, tensor by tensor, in little memory.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("direction", help=", ".join(DIRECTIONS))
    parser.add_argument("source", help="what to read")
    parser.add_argument("destination", help="the folder to make")
    parser.add_argument("--iteration", type=int, metavar="N", help="of a run, which checkpoint (default: the latest)")
    parser.add_argument(
        "--dtype", choices=("bf16", "fp16", "fp32"), help="of the weights written (default: as they are)"
    )
    parser.add_argument(
        "--tokenizer", metavar="PATH", help="the tokenizer to put beside the weights (default: the source's)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a folder of the same kind that is there")
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        help="run the same tokens through both sides and compare layer by layer (default: where memory allows)",
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """`megatron-rocm convert …`. Returns the exit status: 1 where --verify finds a difference. Raises UsageError."""
    args = _parser().parse_args(argv)
    if args.direction not in DIRECTIONS:
        raise UsageError(f"convert {args.direction}: there is no such direction; there are {', '.join(DIRECTIONS)}")
    reads, writes = DIRECTIONS[args.direction]
    if args.iteration is not None and reads != "megatron":
        raise UsageError(f"convert {args.direction}: --iteration is of a run's checkpoints")
    return convert(
        reads, args.source, writes, args.destination, iteration=args.iteration, dtype=args.dtype,
        tokenizer=args.tokenizer, overwrite=args.overwrite, verify=args.verify,
    )  # fmt: skip


def convert(
    reads: str,
    source: str,
    writes: str,
    destination: str,
    *,
    iteration: int | None = None,
    dtype: str | None = None,
    tokenizer: str | None = None,
    overwrite: bool = False,
    verify: bool | None = None,
) -> int:
    """Convert, say what was written, and compare both sides. The exit status of the command. Raises UsageError."""
    local = (destination,) if reads == "megatron" else (source, destination)
    if there := next((one for one in local if is_remote(one)), None):
        raise UsageError(f"convert: {shown(there)}: only a checkpoint to read may be in a remote store; name a folder")
    threading.Thread(target=_begin_to_read, args=(source,), daemon=True).start()
    options: dict[str, Any] = {"dtype": dtype, "tokenizer": tokenizer, "overwrite": overwrite, "verify": verify}
    if reads == "megatron" and is_remote(source):
        from megatron_rocm.checkpoint.convert.remote import fetched

        with fetched(source, iteration, Path(destination).absolute(), tokenizer) as opened:
            return finish(opened, writes, destination, **options)
    if reads == "megatron":
        from megatron_rocm.checkpoint.convert.from_megatron import FromMegatron

        return finish(FromMegatron(source, iteration, tokenizer=tokenizer), writes, destination, **options)
    if reads == "meta":
        from megatron_rocm.checkpoint.convert.from_meta import FromMeta

        return finish(FromMeta(source), writes, destination, **options)
    from megatron_rocm.checkpoint.convert.from_huggingface import FromHuggingFace

    return finish(FromHuggingFace(source), writes, destination, **options)


def _begin_to_read(source: str) -> None:
    """Have the disk at work while torch is loaded, which takes seconds: what is missing is for others to tell."""
    first = next((path for pattern in FIRST for path in sorted(Path(source).glob(pattern))), None)
    with contextlib.suppress(OSError):
        if first:
            handle = os.open(first, os.O_RDONLY)
            os.posix_fadvise(handle, 0, EARLY, os.POSIX_FADV_WILLNEED)
            os.close(handle)


def finish(
    source: Source,
    writes: str,
    destination: str,
    *,
    dtype: str | None = None,
    tokenizer: str | None = None,
    overwrite: bool = False,
    verify: bool | None = None,
) -> int:
    """As `convert`, of an opened source."""
    # Of fused kernels that are missing and of names that will go: nothing that concerns weights.
    warnings.filterwarnings("ignore", module=r"megatron\.core|torch\.distributed")
    from megatron_rocm.checkpoint.convert.source import DTYPES
    from megatron_rocm.checkpoint.convert.to_huggingface import write_huggingface
    from megatron_rocm.checkpoint.convert.to_megatron import write_checkpoint

    began = time.monotonic()
    write = write_checkpoint if writes == "megatron" else write_huggingface
    kind = DTYPES[dtype] if dtype else None
    folder = write(source, destination, dtype=kind, overwrite=overwrite, tokenizer=tokenizer)
    size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    print(f"wrote {folder}: {source.model.title}, {size / 1e9:.2f} GB in {time.monotonic() - began:.1f} s", flush=True)
    if writes == "huggingface" and not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        print("without a tokenizer: the source has none that Hugging Face reads; --tokenizer FOLDER adds one")
    if verify is False:
        return 0
    from megatron_rocm.checkpoint.convert import verifying

    if verify is None and (reason := verifying.beyond_memory(source.model)):
        print(f"not verified: {reason}; --verify does it all the same")
        return 0
    agreement = verifying.verify(source, folder)
    print(agreement)
    return 0 if agreement else 1
