from __future__ import annotations

import random

import pytest

from megatron_rocm.data import wikitext
from megatron_rocm.data.wikitext import plain

HIDDEN = ("file", "image", "category", "datei", "kategorie", "檔案")


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("'''Bold''' and ''italic'' and '''''both''''' isn't", "Bold and italic and both isn't"),
        (
            "[[Berlin]] and [[Berlin|the city]]s and [[:Category:Cities]]",
            "Berlin and the citys and Category:Cities",
        ),
        ("a[[File:x.png|thumb|A [[link]] in a caption]]b[[Datei:y.jpg]]c[[檔案:z.svg|right]]d", "abcd"),
        ("Text.\n\n[[Category:A]]\n[[Kategorie:B|key]]\n[[de:Titel]]\n[[zh-yue:題]]\n[[simple:Title]]", "Text."),
        ("one<ref name=a>{{cite|x}}</ref> two<ref name=a /> three<!-- hidden -->", "one two three"),
        ("a {{template|with=[[link]]|{{nested}}}} b", "a  b"),
        ("Anna (; {{lang|x}}, ) lives", "Anna lives"),
        ("before\n{|class=x\n! head\n|-\n| cell [[link]]\n|}\nafter", "before\n\nafter"),
        (
            "* one\n**two\n# three\n:indented\n; term\n*\n-dash - - dash",
            "- one\n- two\n- three\nindented\nterm\n\n-dash - - dash",
        ),
        ("x&nbsp;y &amp; z &lt;b&gt; &#8212;", "x\u00a0y & z <b> —"),
        ("See [https://example.org the site] or [https://example.org] or https://example.org", None),
        ("<p>one</p><p>two</p>line<br>break", "one\n\ntwo\nline\nbreak"),
        ("<math>x^2</math> <nowiki>[[raw]]</nowiki> <gallery>\na.png|b\n</gallery>end", "x^2 [[raw]] end"),
        ("__NOTOC__\ntext", "text"),
        ("a {{x|{{y|{{{1|}}}}}|<nowiki>}}</nowiki>}} b", "a  b"),
        (
            "<nowiki>{{kept}} <ref>kept</ref></nowiki> <math>\\frac{{a}}{b}</math>",
            "{{kept}} <ref>kept</ref> \\frac{{a}}{b}",
        ),
        ("{|\n| outer\n{|\n| inner\n|}\n|}\nafter {| no table |} end", "after {| no table |} end"),
        ("one<REF>{{x}}</ref> two<!-- {{ --> three}}", "one two three}}"),
        ("-{zh-hans:计算机; zh-hant:電腦;}- 與 -{A|原文}- -{保}-", "计算机 與 原文 保"),
        ("{{only|a template}}", ""),
        ("", ""),
    ],
)
def test_plain(markup, text):
    expected = text if text is not None else "See the site or  or https://example.org"
    assert plain(markup, HIDDEN) == expected


def test_sections_without_text_are_left_out():
    markup = "Lead.\n== A ==\n=== A1 ===\n{{x}}\n=== A2 ===\ntext\n== B ==\n{{y}}\n=== B1 ===\n"
    markup += "\n== C [[l|link]] ==\nend\n== D =="
    assert plain(markup) == "Lead.\n\nA\n\nA2\n\ntext\n\nC link\n\nend"


@pytest.mark.parametrize(
    "markup", ["[[unclosed", "{{unclosed", "'''open", "<ref>open", "{| open", "]] }} |}", "[[a|[[b]]", "=" * 50]
)
def test_broken_markup_still_gives_text(markup):
    assert isinstance(plain(f"before {markup} after", HIDDEN), str)


def test_deep_nesting_is_told_not_crashed():
    for deep in ("[[a|" * 1000 + "]]" * 1000, "<div>" * 1000, "{{" * 1000):
        try:
            plain(deep)
        except ValueError as error:
            assert "Error" in str(error)


def nested(rng, depth=0):
    """Well-formed markup at random, templates and tables in each other."""
    parts = []
    for _ in range(rng.randrange(1, 5)):
        kind = rng.randrange(9)
        if kind == 0 and depth < 4:
            parts.append("{{t|" + nested(rng, depth + 1).replace("\n", " ") + "}}")
        elif kind == 1 and depth < 2:
            parts.append("\n{|\n|-\n| " + nested(rng, depth + 1) + "\n|}\n")
        elif kind == 2:
            parts.append("<ref>" + rng.choice(["x", "{{y}}", "[[z]]"]) + "</ref>")
        else:
            parts.append(rng.choice(["word ", "[[a|b]] ", "''i'' ", "<!-- c -->", "\n* item\n", "\n== H ==\nt\n"]))
    return "".join(parts)


def test_what_goes_before_the_parser_is_what_the_parser_leaves_out(monkeypatch):
    rng = random.Random(7)
    markups = [nested(rng) for _ in range(500)]
    texts = [plain(markup) for markup in markups]
    monkeypatch.setattr(wikitext, "_seen", lambda markup: markup)
    assert texts == [plain(markup) for markup in markups] and len(set(texts)) > 50
