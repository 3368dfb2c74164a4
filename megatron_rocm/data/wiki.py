"""`megatron-rocm data wiki`: a Wikimedia project's articles as JSON Lines, from its dump.

The dump is downloaded, checked against the dump's own list of checksums, and read as a stream: the articles of
namespace 0 that are no redirects, their markup made plain, one {"id", "url", "title", "text"} a line.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_rocm.data.command import Parser
from megatron_rocm.data.download import NotThere, download, read, verify
from megatron_rocm.errors import UsageError

MIRROR = "https://dumps.wikimedia.org"
# The first that a dump has. A multistream file is many small bz2 streams, so a second call can go on amid the file.
KINDS = ("pages-articles-multistream", "pages-articles")
DESCRIPTION = (
    'Download a wiki\'s articles as JSON Lines: {"id", "url", "title", "text"}, one article a line. A second call goes '
    "on where the first one stood, in the download as in the extraction."
)


@dataclass(frozen=True)
class Dump:
    """One file of a dump. `digest` is "algorithm:hex", from the dump's list."""

    name: str
    url: str
    digest: str


def _parser() -> argparse.ArgumentParser:
    parser = Parser("wiki", DESCRIPTION)
    parser.add_argument("--language", default="zh-classical", help="as in LANGUAGE.wikipedia.org (%(default)s)")
    parser.add_argument("--date", default="latest", help="the dump's date, YYYYMMDD (%(default)s)")
    parser.add_argument("--project", default="wiki", help="wiki is Wikipedia; wikinews, wikibooks, … (%(default)s)")
    parser.add_argument("--output-dir", metavar="DIR", help="where dump and text go (wiki_data_LANGUAGE)")
    parser.add_argument("--output", metavar="FILE", help="another name for the text than DIR/<dump>.jsonl")
    parser.add_argument("--dump", metavar="FILE", help="a dump that is there already, .xml.bz2 or .xml; no download")
    parser.add_argument("--mirror", metavar="URL", default=MIRROR, help="of the dumps (%(default)s)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that read markup (all CPUs)")
    parser.add_argument("--verify", action="store_true", help="check a dump that is there already once more")
    return parser


def main(argv: Sequence[str]) -> int:
    """Exit status 0. Raises UsageError for what a person can mend."""
    args = _parser().parse_args(argv)
    if importlib.util.find_spec("mwparserfromhell") is None:
        raise UsageError("data wiki reads markup with mwparserfromhell: pip install 'megatron-rocm[data]'")
    if args.workers is not None and args.workers < 1:
        raise UsageError(f"--workers={args.workers}: must be 1 or more")
    folder = Path(args.output_dir or f"wiki_data_{args.language}").expanduser()
    if args.dump:
        source = Path(args.dump).expanduser()
        if not source.is_file():
            raise UsageError(f"--dump={args.dump}: no such file")
    else:
        dump = find_dump(args.language, args.date, args.project, args.mirror)
        source = folder / dump.name
        if not download(dump.url, source, digest=dump.digest) and args.verify:
            verify(source, dump.digest)
    output = Path(args.output).expanduser() if args.output else folder / f"{_stem(source.name)}.jsonl"
    if output.exists():
        print(f"{output}: is there already")
        return 0

    from megatron_rocm.data.wiki_extract import extract

    began = time.monotonic()
    counts = extract(source, output, args.workers or len(os.sched_getaffinity(0)))
    left_out = ", ".join(f"{number:,} {what}" for what, number in counts.left_out.items() if number)
    print(
        f"{output}: {counts.articles:,} articles, {counts.text_bytes:,} bytes of text, {time.monotonic() - began:.0f} s"
        + (f"; left out: {left_out}" if left_out else "")
    )
    return 0


def find_dump(language: str, date: str = "latest", project: str = "wiki", mirror: str = MIRROR) -> Dump:
    """The articles' file of a wiki's dump, by the list of checksums that is part of the dump.

    Raises UsageError where there is no such wiki or date, or the dump isn't finished.
    """
    if not re.fullmatch(r"[a-z][a-z0-9-]*", language) or not re.fullmatch(r"[a-z]+", project):
        raise UsageError(
            f"--language={language} --project={project}: a language is the first word of a wiki's address, such as en, "
            "simple or zh-classical; a project is wiki, wikinews, wikibooks, …"
        )
    if date != "latest" and not re.fullmatch(r"\d{8}", date):
        raise UsageError(f"--date={date}: must be YYYYMMDD, or latest")
    wiki = f"{language.replace('-', '_')}{project}"
    top = f"{mirror.rstrip('/')}/{wiki}"
    for algorithm in ("sha1", "md5"):
        try:
            listing = read(f"{top}/{date}/{wiki}-{date}-{algorithm}sums.txt").decode(errors="replace")
        except NotThere:
            continue
        for kind in KINDS:
            # The list of `latest`, too, names the files by their date.
            found = re.search(rf"^([0-9a-f]+) [ *]({wiki}-(\d{{8}})-{kind}\.xml\.bz2)$", listing, re.MULTILINE)
            if found:
                return Dump(found[2], f"{top}/{found[3]}/{found[2]}", f"{algorithm}:{found[1]}")
    raise UsageError(
        f"--language={language} --date={date}: {top}/{date}/ lists no {wiki}-…-{KINDS[0]}.xml.bz2. Look there whether "
        "the wiki has this name, and the dump of that date is still kept and finished"
    )


def _stem(name: str) -> str:
    for suffix in (".bz2", ".xml"):
        name = name.removesuffix(suffix)
    return name
