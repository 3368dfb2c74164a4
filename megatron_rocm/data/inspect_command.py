"""`megatron-rocm data inspect PREFIX`: what a pair holds, drawn and decoded, and whether all of it is right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rocm.data.combine_command import bare
from megatron_rocm.data.command import Parser
from megatron_rocm.data.facts import recorded, resolve_model
from megatron_rocm.data.hub import find_files
from megatron_rocm.data.indexed import HEADER, read_sidecar
from megatron_rocm.data.pairs import Pair, check_ids, check_offsets, mapped, require_checksum, require_counts
from megatron_rocm.data.tokenizer import TokenizerInfo, inspect
from megatron_rocm.errors import UsageError

BAR = 40  # characters of the histogram's longest bar
SHOWN_TOKENS, SHOWN_TEXT = 100, 240  # of a sample: ids that are decoded, characters that are printed


@dataclass
class Lengths:
    """Documents by their tokens: `counts[0]` are the empty ones, `counts[b]` those of 2^(b-1) to 2^b - 1 tokens."""

    counts: np.ndarray = field(default_factory=lambda: np.zeros(64, np.int64))
    shortest: int = 2**62
    longest: int = 0

    def add(self, lengths: np.ndarray) -> None:
        self.shortest, self.longest = min(self.shortest, int(lengths.min())), max(self.longest, int(lengths.max()))
        _, exponents = np.frexp(lengths)
        self.counts += np.bincount(exponents, minlength=64)

    def rows(self) -> Iterator[tuple[int, int, int]]:
        """(least, most, documents) from the first bin that is not empty to the last."""
        used = np.flatnonzero(self.counts)
        for number in range(int(used[0]), int(used[-1]) + 1):
            yield (1 << number) >> 1, max(0, (1 << number) - 1), int(self.counts[number])


def main(arguments: Sequence[str]) -> int:
    """`megatron-rocm data inspect`. Returns 0; raises UsageError, so exit status 2, for a pair that is damaged."""
    parser = Parser("inspect", "Show what a .bin/.idx pair holds, and read all of it to see whether it is right.")
    parser.add_argument("prefix", metavar="PREFIX", help="of the pair, with or without .bin or .idx")
    parser.add_argument(
        "--samples", type=int, default=3, metavar="N", help="documents to decode (default: %(default)s)"
    )
    parser.add_argument("--tokenizer-model", metavar="NAME", help="folder, file or hub name (default: the data's own)")
    parser.add_argument(
        "--tokenizer-type", default="HuggingFaceTokenizer", metavar="TYPE", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--picture", metavar="FILE", help="histogram as .png, .svg or .pdf (default: PREFIX_lengths.png)"
    )
    args = parser.parse_args(arguments)
    if args.samples < 0:
        raise UsageError(f"--samples {args.samples}: must be 0 or more")
    prefix = bare(args.prefix)

    pair = check_offsets(prefix, "PREFIX")
    sidecar = read_sidecar(prefix)
    info, missing = _tokenizer(prefix, sidecar, args.tokenizer_model, args.tokenizer_type)
    lengths = Lengths()
    for block in pair.document_lengths():
        lengths.add(block)
    print("\n".join([prefix, *_facts(pair, lengths, sidecar, info)]))
    if pair.documents:
        print("\n".join(["", *_histogram(lengths)]))
        print(_draw(pair, lengths, Path(args.picture or f"{prefix}_lengths.png"), named=bool(args.picture)))
    print("", flush=True)
    for line in _checks(pair, sidecar, info):
        print(line, flush=True)
    if pair.documents and args.samples:
        print("\n".join(["", *_samples(pair, info, missing, args.samples)]))
    return 0


def _tokenizer(
    prefix: str, sidecar: dict[str, Any] | None, model: str | None, kind: str
) -> tuple[TokenizerInfo | None, str]:
    """The tokenizer of the data, and why it can't be loaded, which for its own one is no reason to stop."""
    own = recorded(sidecar["tokenizer"]) if sidecar else None
    if model:
        info = inspect(model, kind)
        if own and own.fingerprint != info.fingerprint:
            raise UsageError(
                f"--tokenizer-model={model}: {prefix} was made with another tokenizer, {own.model}; leave it out, or "
                "name that one"
            )
        return info, ""
    if own is None:
        return None, "nothing beside the data names its tokenizer: name it with --tokenizer-model"
    try:
        return inspect(resolve_model(own.model, prefix), own.type), ""
    except UsageError as error:
        return own, f"{error}, or name a copy with --tokenizer-model"


def _facts(pair: Pair, lengths: Lengths, sidecar: dict[str, Any] | None, info: TokenizerInfo | None) -> list[str]:
    head = pair.head
    sequences = f" of {head.sequences:,} sequences" if head.sequences != pair.documents else ""
    idx_size = HEADER.size + 12 * head.sequences + 8 * head.boundaries
    rows = {
        "documents": f"{pair.documents:,}{sequences}" + (f", {lengths.counts[0]:,} empty" if lengths.counts[0] else ""),
        "tokens": f"{pair.tokens:,}",
        "size": f"{_size(head.bin_size)} .bin of {head.dtype}, {_size(idx_size)} .idx",
        "tokenizer": "unknown"
        if info is None
        else f"{info.model}, {info.vocab_size:,} ids, EOD {info.eod} ({info.type})",
    }
    if pair.documents:
        mean = pair.tokens / pair.documents
        rows["tokens"] += f"; {mean:,.1f} a document, {lengths.shortest:,} to {lengths.longest:,}"
    if sidecar:
        source = sidecar["source"]
        eod = {True: ", an EOD after each document", False: ", no EODs"}.get(source.get("append_eod"), "")
        rows["made from"] = f"{source.get('input', 'unknown')}{eod}"
    return [f"  {name:<10} {value}" for name, value in rows.items()]


def _size(size: int) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000  # type: ignore[assignment]
    return f"{size:,.3g} TB"


def _histogram(lengths: Lengths) -> list[str]:
    rows = list(lengths.rows())
    most, total = max(row[2] for row in rows), sum(row[2] for row in rows)
    width = len(f"{rows[-1][1]:,}")
    lines = [f"  {'tokens':>{2 * width + 3}}  documents"]
    for low, high, count in rows:
        bar = "█" * max(count > 0, round(BAR * count / most))
        lines.append(f"  {low:>{width},} - {high:>{width},}  {bar:<{BAR}} {count:,} ({count / total:.1%})")
    return lines


def _draw(pair: Pair, lengths: Lengths, picture: Path, *, named: bool) -> str:
    """Draw the histogram; the line that says where. One that was not asked for may fail: data can be read-only."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = list(lengths.rows())
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.bar(range(len(rows)), [count for _, _, count in rows], width=0.95)
    axes.set_xticks(range(len(rows)), [f"{low:,}" for low, _, _ in rows], rotation=45)
    title = f"{Path(pair.prefix).name}: {pair.documents:,} documents, {pair.tokens:,} tokens"
    axes.set(xlabel="tokens in a document, from", ylabel="documents", title=title)
    axes.grid(alpha=0.3, axis="y")
    try:
        figure.savefig(picture, dpi=120)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        if named:
            raise UsageError(f"--picture {picture}: can't be written: {why}; name another .png, .svg or .pdf") from None
        return f"  no picture: {picture} can't be written ({why}); --picture FILE puts it elsewhere"
    finally:
        pyplot.close(figure)
    return f"  picture: {picture}"


def _samples(pair: Pair, info: TokenizerInfo | None, missing: str, count: int) -> list[str]:
    """The first tokens of documents from all over the data, as text."""
    if info is None or missing:
        return [f"  no samples: {missing}"]
    decode = _decoder(info)
    ids = np.memmap(f"{pair.prefix}.bin", pair.head.dtype, "r") if pair.tokens else np.empty(0, pair.head.dtype)
    pointers, ends = mapped(pair.prefix, pair.head, "offsets"), mapped(pair.prefix, pair.head, "boundaries")
    lines = []
    for number in sorted({part * pair.documents // count for part in range(count)}):
        begin, end = (
            int(pointers[at]) // pair.head.dtype.itemsize if at < len(pointers) else pair.tokens
            for at in (int(ends[number]), int(ends[number + 1]))
        )
        text = decode(ids[begin : min(end, begin + SHOWN_TOKENS)].tolist())
        more = " …" if end > begin + SHOWN_TOKENS or len(text) > SHOWN_TEXT else ""
        lines.append(f"  document {number:,}, {end - begin:,} tokens: {text[:SHOWN_TEXT]!r}{more}")
    return lines


def _decoder(info: TokenizerInfo) -> Callable[[list[int]], str]:
    files = find_files(info.model, info.type)
    if files.sentencepiece:
        from sentencepiece import SentencePieceProcessor

        processor = SentencePieceProcessor(model_file=str(files.main))
        return lambda ids: str(processor.decode(ids))
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(files.main))
    return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=False))


def _checks(pair: Pair, sidecar: dict[str, Any] | None, info: TokenizerInfo | None) -> Iterator[str]:
    """Lines on what was found right. Raises UsageError for what was not."""
    if sidecar:
        require_counts(pair, sidecar, "PREFIX")
    yield f"  offsets    all {pair.head.sequences:,} right"
    content = check_ids(pair, info.vocab_size if info else None, "PREFIX")
    highest = f"the highest is {content.highest:,}" if pair.tokens else "none"
    yield f"  ids        {highest}" + (f", of {info.vocab_size:,} there are" if info else "")
    require_checksum(pair, sidecar, content.checksum, "PREFIX")
    yield f"  checksum   {content.checksum}" + (", as recorded" if sidecar and "checksum" in sidecar else "")
