from __future__ import annotations

import bz2
import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from megatron_rocm.data import wiki, wiki_extract
from megatron_rocm.data.wiki import find_dump
from megatron_rocm.data.wiki_extract import extract
from megatron_rocm.errors import UsageError

HEAD = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" xml:lang="de">
  <siteinfo>
    <sitename>Wikipedia</sitename>
    <base>https://de.wikipedia.org/wiki/Wikipedia:Hauptseite</base>
    <namespaces>
      <namespace key="0" case="first-letter" />
      <namespace key="6" case="first-letter">Datei</namespace>
      <namespace key="14" case="first-letter">Kategorie</namespace>
    </namespaces>
  </siteinfo>
"""
PAGE = """  <page>
    <title>{title}</title>
    <ns>{ns}</ns>
    <id>{id}</id>{redirect}
    <revision>
      <id>9{id}</id>
      <contributor><username>title</username><id>7</id></contributor>
      <model>{model}</model>
      <text bytes="5" xml:space="preserve">{text}</text>
    </revision>
  </page>
"""


def page(id, title, text, ns=0, model="wikitext", redirect=""):
    return PAGE.format(id=id, title=title, text=text, ns=ns, model=model, redirect=redirect)


PAGES = [
    page(1, "Grüße &amp; Co", "'''Grüße''' [[Datei:x.png|mini]]aus [[Köln]].\n[[Kategorie:K]]"),
    page(2, "Umleitung", "#WEITERLEITUNG [[A]]", redirect='\n    <redirect title="A" />'),
    page(3, "Diskussion:A", "talk", ns=1),
    page(4, "Data", "{}", model="json"),
    page(5, "Leer", "{{Vorlage}}"),
    page(6, "100 %?", "Ein &lt;b&gt;fetter&lt;/b&gt; Satz."),
    page(7, "Tief", "&lt;div&gt;" * 2000 + "x"),
]
LINES = [
    {
        "id": "1",
        "url": "https://de.wikipedia.org/wiki/Gr%C3%BC%C3%9Fe_%26_Co",
        "title": "Grüße & Co",
        "text": "Grüße aus Köln.",
    },
    {
        "id": "6",
        "url": "https://de.wikipedia.org/wiki/100_%25%3F",
        "title": "100 %?",
        "text": "Ein fetter Satz.",
    },
]


def multistream(pages, each=2):
    """As Wikimedia writes it: the head, some pages a stream, the end."""
    parts = [HEAD, *("".join(pages[at : at + each]) for at in range(0, len(pages), each)), "</mediawiki>\n"]
    return b"".join(bz2.compress(part.encode()) for part in parts)


def pieces(pages, size=1500):
    """As parallel compressors write it: streams that end anywhere."""
    raw = (HEAD + "".join(pages) + "</mediawiki>\n").encode()
    return b"".join(bz2.compress(raw[at : at + size]) for at in range(0, len(raw), size))


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.xml.bz2", multistream(PAGES)),
        ("a.xml.bz2", bz2.compress((HEAD + "".join(PAGES) + "</mediawiki>").encode())),
        ("a.xml.bz2", pieces(PAGES)),
        ("a.xml", (HEAD + "".join(PAGES) + "</mediawiki>").encode()),
    ],
    ids=["multistream", "one stream", "pieces", "xml"],
)
def test_articles(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    counts = extract(tmp_path / name, tmp_path / "out.jsonl", 1)
    lines = [line for line in read_lines(tmp_path / "out.jsonl") if line["id"] != "7"]
    assert lines == LINES
    unreadable = counts.left_out["unreadable"]
    assert counts.articles == 3 - unreadable and counts.text_bytes >= 33
    assert counts.left_out == {
        "redirects": 1, "of other namespaces": 1, "not wikitext": 1, "without text": 1, "unreadable": unreadable,
    }  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "out.jsonl"])


@pytest.mark.parametrize("cut", [40, 500, -60, -1])
def test_a_truncated_dump(tmp_path, cut):
    source = tmp_path / "a.xml.bz2"
    source.write_bytes(multistream(PAGES)[:cut])
    with pytest.raises(UsageError, match="a.xml.bz2: is damaged or truncated, near byte .* Remove it"):
        extract(source, tmp_path / "out.jsonl", 1)
    assert not (tmp_path / "out.jsonl").exists()


def test_a_truncated_dump_that_ends_between_streams(tmp_path):
    source = tmp_path / "a.xml.bz2"
    source.write_bytes(multistream(PAGES)[: -len(bz2.compress(b"</mediawiki>\n"))])
    with pytest.raises(UsageError, match="no element found"):
        extract(source, tmp_path / "out.jsonl", 1)


def test_damaged_bytes(tmp_path):
    content = bytearray(multistream(PAGES))
    content[len(content) // 2] ^= 0xFF
    (tmp_path / "a.xml.bz2").write_bytes(content)
    with pytest.raises(UsageError, match="damaged"):
        extract(tmp_path / "a.xml.bz2", tmp_path / "out.jsonl", 1)


CHILD = """
import sys
from pathlib import Path
from megatron_rocm.data import wiki_extract
wiki_extract.SAVE_EVERY, wiki_extract.BATCH, wiki_extract.BLOCK = 0, 2000, 3000
print("started", flush=True)
wiki_extract.extract(Path(sys.argv[1]), Path(sys.argv[2]), 2)
"""


@pytest.mark.parametrize("compress", [multistream, pieces], ids=["multistream", "pieces"])
def test_kill_and_go_on(tmp_path, compress):
    """kill -9 at random moments: the final file is that of an undisturbed run."""
    rng = random.Random(3)
    many = [page(id, f"Seite {id}", f"Satz {id}. " * rng.randrange(1, 40), int(id % 7 == 0)) for id in range(1, 3001)]
    source = tmp_path / "a.xml.bz2"
    source.write_bytes(compress(many, 100 if compress is multistream else 60_000))
    extract(source, tmp_path / "whole.jsonl", 1)
    output, notes = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial.json"
    went_on = kills = 0
    while not output.exists():
        went_on += notes.exists()
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(source), str(output)],
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert child.stdout is not None and child.stdout.readline() == b"started\n"
        # Patience grows, so that the last one ends.
        if kills < 5:
            deadline = time.monotonic() + rng.uniform(0.1, 0.5) * (1 + kills)
            while child.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            kills += 1
        child.communicate()
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert len(read_lines(output)) == sum(id % 7 != 0 for id in range(1, 3001))
    assert not notes.exists() and went_on


def test_memory_is_bounded(tmp_path):
    """30 MB of XML pass through less than half of that."""
    body = "".join(page(id, f"S{id}", random.Random(id).randbytes(50_000).hex(), ns=1) for id in range(10)).encode()
    streams = [HEAD.encode(), *[body] * 30, b"</mediawiki>"]
    packed = {part: bz2.compress(part, 1) for part in set(streams)}
    (tmp_path / "a.xml.bz2").write_bytes(b"".join(packed[part] for part in streams))
    code = (
        "import resource, sys; from pathlib import Path; from megatron_rocm.data.wiki_extract import extract\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "extract(Path('a.xml.bz2'), Path('out.jsonl'), 1)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert int(done.stdout.split()[-1]) < 15_000, done.stderr


@pytest.fixture
def dumps(web):
    """A mirror with one dump of 2026-11-01 of the German Wikipedia."""
    content = multistream(PAGES)
    name = "dewiki-20261101-pages-articles-multistream.xml.bz2"
    sums = "".join(
        f"{hashlib.sha1(data).hexdigest()}  {file}\n"
        for file, data in (("dewiki-20261101-pages-articles.xml.bz2", b"other"), (name, content))
    )
    web.put("/dewiki/20261101/" + name, content)
    web.put("/dewiki/20261101/dewiki-20261101-sha1sums.txt", sums.encode())
    web.put("/dewiki/latest/dewiki-latest-sha1sums.txt", sums.encode())
    return web


def test_the_whole_way(dumps, tmp_path, capsys):
    arguments = ["--language", "de", "--mirror", dumps.url, "--output-dir", str(tmp_path), "--workers", "1"]
    dumps.pages["/dewiki/20261101/dewiki-20261101-pages-articles-multistream.xml.bz2"].faults.append({"whole": True})
    assert wiki.main(arguments) == 0
    output = tmp_path / "dewiki-20261101-pages-articles-multistream.jsonl"
    assert read_lines(output)[0] == LINES[0]
    said = capsys.readouterr().out
    assert f"{output}: " in said and "1 redirects" in said
    before = len(dumps.requests)
    assert wiki.main([*arguments, "--date", "20261101"]) == 0
    assert "is there already" in capsys.readouterr().out and len(dumps.requests) == before + 1
    # A dump that lies there is looked at again when that is asked for.
    source = output.with_suffix(".xml.bz2")
    source.write_bytes(source.read_bytes()[:-1] + b"x")
    with pytest.raises(UsageError, match="damaged"):
        wiki.main([*arguments, "--verify"])


def test_a_dump_of_ones_own(tmp_path, capsys):
    (tmp_path / "mine.xml.bz2").write_bytes(multistream(PAGES))
    assert wiki.main(["--dump", str(tmp_path / "mine.xml.bz2"), "--output", str(tmp_path / "o.jsonl")]) == 0
    assert read_lines(tmp_path / "o.jsonl")[0] == LINES[0]


def test_find_dump(dumps):
    found = find_dump("de", mirror=dumps.url)
    assert found.url == f"{dumps.url}/dewiki/20261101/dewiki-20261101-pages-articles-multistream.xml.bz2"
    assert found.digest == f"sha1:{hashlib.sha1(multistream(PAGES)).hexdigest()}"
    # Only md5, only the plain file; a language with a hyphen.
    line = f"{'1' * 32}  be_x_oldwiki-20261101-x.sql.gz\n{'0' * 32}  be_x_oldwiki-20261101-pages-articles.xml.bz2\n"
    dumps.put("/be_x_oldwiki/20261101/be_x_oldwiki-20261101-md5sums.txt", line.encode())
    found = find_dump("be-x-old", "20261101", mirror=dumps.url + "/")
    assert (found.name, found.digest) == ("be_x_oldwiki-20261101-pages-articles.xml.bz2", f"md5:{'0' * 32}")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--language", "xx"], "--language=xx --date=latest: .*/xxwiki/latest/ lists no xxwiki-"),
        (["--language", "de", "--date", "20250101"], "--date=20250101: .* still kept and finished"),
        (["--language", "de", "--date", "2025"], "--date=2025: must be YYYYMMDD"),
        (["--language", "../x"], "--language=../x"),
        (["--workers", "0"], "--workers=0: must be 1"),
        (["--dump", "/no/such"], "--dump=/no/such: no such file"),
        (["--no-such"], "unrecognized arguments: --no-such.*--help"),
    ],
)
def test_mistakes(dumps, tmp_path, arguments, words):
    with pytest.raises(UsageError, match=words):
        wiki.main(["--mirror", dumps.url, "--output-dir", str(tmp_path), *arguments])
    assert list(tmp_path.iterdir()) == []


def test_the_parser_is_asked_for_before_anything_is_downloaded(dumps, tmp_path, monkeypatch):
    monkeypatch.setattr(wiki.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install 'megatron-rocm.data.'"):
        wiki.main(["--language", "de", "--mirror", dumps.url])
    assert not dumps.requests


def test_the_namespaces_own_words_hide_links():
    assert {"datei", "kategorie", "file"} <= set(_site().hidden)


def _site():
    xml = wiki_extract._Xml(begun=False)
    xml.feed(HEAD.encode())
    return xml.site
