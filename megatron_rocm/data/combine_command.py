"""`megatron-rocm data merge`, `concat` and `split`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from megatron_rocm.data import combine, divide
from megatron_rocm.data.command import Parser
from megatron_rocm.data.indexed import read_sidecar
from megatron_rocm.errors import UsageError

NAMES = ("train", "valid", "test")


def merge(arguments: Sequence[str]) -> int:
    """All pairs of a folder, as Megatron-LM's tools/merge_datasets.py takes them, by number where names hold one."""
    parser = Parser("merge", "Put all .bin/.idx pairs of a folder one after the other: numbers in names count as such.")
    parser.add_argument("--input", required=True, metavar="FOLDER", help="the folder; its sub-folders are left alone")
    parser.add_argument("--output-prefix", required=True, metavar="OUT", help="OUT.bin, OUT.idx and OUT.json are made")
    parser.add_argument("--overwrite", action="store_true", help="replace an OUT that is there")
    args = parser.parse_args(arguments)
    prefixes = pairs_in(args.input, args.output_prefix)
    _require_all_shards(prefixes, args.input)
    return _combine(prefixes, args.output_prefix, "--input", args.overwrite)


def concat(arguments: Sequence[str]) -> int:
    """The pairs named, in the order in which they are named."""
    parser = Parser("concat", "Put .bin/.idx pairs one after the other, in the order given.")
    parser.add_argument("prefixes", nargs="+", metavar="PREFIX", help="of a pair, with or without .bin or .idx")
    parser.add_argument("--output-prefix", required=True, metavar="OUT", help="OUT.bin, OUT.idx and OUT.json are made")
    parser.add_argument("--overwrite", action="store_true", help="replace an OUT that is there")
    args = parser.parse_args(arguments)
    return _combine([bare(prefix) for prefix in args.prefixes], args.output_prefix, "PREFIX", args.overwrite)


def split(arguments: Sequence[str]) -> int:
    """A pair into several, by shares or numbers of its documents."""
    parser = Parser("split", "Divide a .bin/.idx pair by documents. They stay in order; nothing is left out.")
    parser.add_argument("prefix", metavar="PREFIX", help="of the pair, with or without .bin or .idx")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--shares", metavar="A,B,…", help="shares of the documents, such as 99,1 (as SPLIT of a run)")
    how.add_argument("--documents", metavar="N,M,…", help="numbers of documents; one may be `rest`, such as rest,1000")
    parser.add_argument("--shuffle", type=int, metavar="SEED", help="draw the documents of each part at random")
    parser.add_argument("--names", metavar="A,B,…", help="of the parts (default: train,valid,test, or numbers)")
    parser.add_argument("--output-prefix", metavar="OUT", help="OUT_<name>.bin, … are made (default: PREFIX)")
    parser.add_argument("--overwrite", action="store_true", help="replace parts that are there")
    args = parser.parse_args(arguments)
    prefix = bare(args.prefix)
    if args.shuffle is not None and not 0 <= args.shuffle < 2**32:
        raise UsageError(f"--shuffle {args.shuffle}: a seed is a whole number from 0 to {2**32 - 1}")
    pair = divide.open_checked(prefix)
    counts = (
        divide.shares_of(args.shares, pair.documents)
        if args.shares
        else divide.counts_of(args.documents, pair.documents)
    )
    names = args.names.split(",") if args.names else _names(len(counts))
    if (
        len(names) != len(counts)
        or len(set(names)) != len(names)
        or not all(re.fullmatch(r"[\w.+-]+", name) for name in names)
    ):
        raise UsageError(
            f"--names {args.names}: must be {len(counts)} different names of letters, digits and . _ + -, one a part"
        )
    outs = [f"{args.output_prefix or prefix}_{name}" for name in names]
    parts = divide.split(pair, counts, outs, shuffle=args.shuffle, overwrite=args.overwrite)
    for part in parts:
        print(f"{part.prefix}: {part.documents:,} documents, {part.tokens:,} tokens, {part.checksum}")
    return 0


def _combine(prefixes: list[str], out: str, key: str, overwrite: bool) -> int:
    result = combine.concat(prefixes, bare(out), key=key, overwrite=overwrite)
    for number, prefix in enumerate(prefixes, 1):
        print(f"  {number}. {prefix}")
    print(
        f"{result.prefix}: {result.parts} pairs, {result.documents:,} documents, {result.tokens:,} tokens, "
        f"{result.checksum}"
    )
    return 0


def pairs_in(folder: str, out: str) -> list[str]:
    """The prefixes of all pairs in a folder but OUT, in natural order.

    Raises UsageError for a folder without any, and where one is still being written or lacks a half.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise UsageError(f"--input={folder}: no such folder; give the one that holds the .bin/.idx pairs")
    found = {path.with_suffix("") for kind in ("bin", "idx") for path in root.glob(f"*.{kind}")}
    own = Path(bare(out)).resolve()
    others = sorted((str(prefix) for prefix in found if prefix.resolve() != own), key=_natural)
    unfinished = sorted(path.name for path in root.glob("*.partial") if not path.name.startswith(f"{own.name}."))
    if unfinished:
        raise UsageError(
            f"--input={folder}: {unfinished[0]} is being written, or what a killed process left. Let it be finished, "
            "or remove it"
        )
    if not others:
        raise UsageError(f"--input={folder}: holds no .bin/.idx pair; give the folder that does")
    return others


def _require_all_shards(prefixes: Sequence[str], folder: str) -> None:
    """Raise UsageError where the shards of a job are here, but not all of them, or others besides."""
    shards = [(read_sidecar(prefix) or {"source": {}})["source"].get("shard") for prefix in prefixes]
    known = [shard for shard in shards if shard]
    for prefix, shard in zip(prefixes, shards, strict=True):
        if shard and not (isinstance(shard, list) and [type(number) for number in shard] == [int, int]):
            raise UsageError(
                f"--input={folder}: {prefix}.json names the shard {shard!r}, and not [number, of how many]"
            )
    if not known:
        return
    count = known[0][1]
    missing = sorted(set(range(count)) - {index for index, _ in known})
    if missing:
        raise UsageError(
            f"--input={folder}: of {count} shards {len(missing)} are missing, the first is number {missing[0]}; make "
            f"it with --shard={missing[0]}/{count}"
        )
    if len(known) < len(shards) or {of for _, of in known} != {count} or len(known) != count:
        raise UsageError(
            f"--input={folder}: holds the {count} shards of a job and other pairs; give a folder of their own, or name "
            "them: megatron-rocm data concat"
        )


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts part_2 before part_10."""
    return [(int(word), "") if word.isdigit() else (-1, word) for word in re.findall(r"\d+|\D+", name)]


def _names(count: int) -> list[str]:
    return list(NAMES[:count]) if 2 <= count <= 3 else [str(number) for number in range(count)]


def bare(prefix: str) -> str:
    """A prefix that may carry its .bin or .idx."""
    return re.sub(r"\.(bin|idx)$", "", prefix)
