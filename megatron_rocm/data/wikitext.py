"""Wiki markup to the text that a reader sees: no templates, tables, references, files or categories."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

# A paragraph of its own; all other tags are part of the running text.
BLOCKS = {
    "blockquote", "center", "dd", "div", "dl", "dt", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p",
    "poem", "pre", "section", "source", "syntaxhighlight", "ul",
}  # fmt: skip
UNSEEN = {
    "gallery", "graph", "hiero", "imagemap", "inputbox", "mapframe", "maplink", "ref", "references", "score", "script",
    "section-begin", "section-end", "style", "table", "templatedata", "templatestyles", "timeline",
}  # fmt: skip
BULLETS = {"*": "- ", "#": "- "}
# [[de:Titel]] without a text of its own stands beside an article, not in it.
INTERLANGUAGE = re.compile(r"([a-z]{2,3}|simple)(-[a-z]+)*")
QUOTES = re.compile(r"'{2,5}")  # italic and bold
SWITCHES = re.compile(r"__[A-Z]{3,}__")
# -{zh-hans:…; zh-hant:…}- writes one word in several scripts; -{…}- and -{flag|…}- protect one.
VARIANTS = re.compile(r"-\{(?:[^{}|]{0,20}\|)?([^{}]*)\}-")
FIRST_VARIANT = re.compile(r"\s*[a-z]{2}(?:-[a-z]+)*\s*:\s*([^;]*)")
EMPTY_BRACKETS = re.compile(r" ?(\([\s,;:/–-]*\)|（[\s,;:、，；]*）)")
LIST_ITEM = re.compile(r"(- *)+")
# What shows nothing goes before the parser, for which it is most of the work; what is left over is still the parser's.
VERBATIM = re.compile(
    r"<(nowiki|math|chem|ce|pre|source|syntaxhighlight)\b[^<>]*(?<!/)>.*?</\1\s*>", re.DOTALL | re.IGNORECASE
)
FIRST_UNSEEN = (
    re.compile(r"<!--.*?-->", re.DOTALL),
    re.compile(r"<ref\b[^<>]*/>", re.IGNORECASE),
    re.compile(r"<(ref|gallery|timeline)\b[^<>]*(?<!/)>.*?</\1\s*>", re.DOTALL | re.IGNORECASE),
)
# An argument or a template without another one inside: removed as often as there are levels.
INNERMOST = re.compile(r"\{\{\{[^{}]*\}\}\}|\{\{[^{}]*\}\}")
DEEPEST = 40
TABLE_EDGE = re.compile(r"^[ \t:]*(?:\{\||\|\})", re.MULTILINE)
HEADING = "\x00"  # begins a heading's line, its level follows; markup can't hold one


def plain(markup: str, hidden: Collection[str] = ()) -> str:
    """The text of a page, paragraphs and headings in lines of their own.

    `hidden` holds, in lower case, the names of the namespaces whose links show nothing: the wiki's own words for File
    and Category. Raises ValueError for markup that the parser gives up on.
    """
    import mwparserfromhell
    from mwparserfromhell.parser import ParserError

    out: list[str] = []
    try:
        # Quote marks are left to QUOTES: pages often have them unbalanced, which costs the parser much time.
        _write(mwparserfromhell.parse(_seen(markup.replace(HEADING, "")), skip_style_tags=True), out, hidden)
    except (ParserError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    text = VARIANTS.sub(_variant, "".join(out))
    for pattern in (QUOTES, SWITCHES, EMPTY_BRACKETS):
        text = pattern.sub("", text)
    return _tidy(text)


def _seen(markup: str) -> str:
    verbatim: list[str] = []

    def keep(match: re.Match[str]) -> str:
        verbatim.append(match[0])
        return f"{HEADING}{len(verbatim) - 1}{HEADING}"

    markup = VERBATIM.sub(keep, FIRST_UNSEEN[0].sub("", markup))
    for pattern in FIRST_UNSEEN[1:]:
        markup = pattern.sub("", markup)
    for _ in range(DEEPEST):
        markup, found = INNERMOST.subn("", markup)
        if not found:
            break
    markup = _without_tables(markup)
    return re.sub(f"{HEADING}(\\d+){HEADING}", lambda match: verbatim[int(match[1])], markup)


def _without_tables(markup: str) -> str:
    kept, at = [], 0
    opened: list[int] = []
    for edge in TABLE_EDGE.finditer(markup):
        if edge[0].endswith("{|"):
            opened.append(edge.start())
        elif opened:
            start = opened.pop()
            if not opened:
                kept.append(markup[at:start])
                at = edge.end()
    return "".join([*kept, markup[at:]])


def _write(code: Any, out: list[str], hidden: Collection[str]) -> None:
    from mwparserfromhell import nodes

    for node in code.nodes:
        if isinstance(node, nodes.Text):
            out.append(node.value)
        elif isinstance(node, nodes.Wikilink):
            _write_link(node, out, hidden)
        elif isinstance(node, nodes.ExternalLink):
            if node.title is not None:
                _write(node.title, out, hidden)
            elif not node.brackets:
                out.append(str(node.url))
        elif isinstance(node, nodes.Heading):
            out.append(f"\n{HEADING}{node.level}")
            _write(node.title, out, hidden)
            out.append("\n")
        elif isinstance(node, nodes.HTMLEntity):
            out.append(node.normalize())
        elif isinstance(node, nodes.Tag):
            _write_tag(node, out, hidden)
        # Templates, their arguments and comments show nothing of their own.


def _write_link(node: Any, out: list[str], hidden: Collection[str]) -> None:
    title = str(node.title).strip()
    namespace, colon, _ = title.partition(":")
    if colon and namespace.strip().lower().replace("_", " ") in hidden:
        return
    if node.text is not None:
        _write(node.text, out, hidden)
    elif not (colon and INTERLANGUAGE.fullmatch(namespace)):
        out.append(title.removeprefix(":"))


def _write_tag(node: Any, out: list[str], hidden: Collection[str]) -> None:
    tag = str(node.tag).strip().lower()
    if tag in UNSEEN:
        return
    if node.wiki_markup and node.self_closing:
        out.append("\n" if tag == "hr" else BULLETS.get(str(node.wiki_markup), ""))
    elif tag == "br":
        out.append("\n")
    elif node.contents is not None:
        edge = "\n" if tag in BLOCKS else ""
        out.append(edge)
        _write(node.contents, out, hidden)
        out.append(edge)


def _variant(match: re.Match[str]) -> str:
    first = FIRST_VARIANT.match(match[1])
    return first[1].strip() if first else match[1]


def _tidy(text: str) -> str:
    """No empty sections, no trailing spaces, at most one empty line."""
    kept: list[str] = []  # from the last line up
    below = 0  # the level of the heading that follows what comes next; text counts as deeper than any
    for line in reversed(text.split("\n")):
        line = line.strip(" \t\xa0")
        if line.startswith(HEADING):
            level, title = int(line[1:2]), line[2:].strip()
            if below <= level or not title:
                continue
            below, line = level, title
        elif line.strip("- "):
            below, line = 7, LIST_ITEM.sub("- ", line, count=1) if line.startswith("- ") else line
        else:
            line = ""
        if line or (kept and kept[-1]):
            kept.append(line)
    return "\n".join(reversed(kept)).strip()
