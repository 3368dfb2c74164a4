"""tools/download_wiki.py by its name, from any folder."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "tools" / "download_wiki.py"


def call(tmp_path, *arguments):
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)


def test_help_and_mistakes(tmp_path):
    shown = call(tmp_path, "--help")
    assert shown.returncode == 0 and "--language" in shown.stdout and "zh-classical" in shown.stdout
    refused = call(tmp_path, "--date", "tomorrow")
    assert refused.returncode == 2 and refused.stderr == "megatron-rocm: --date=tomorrow: must be YYYYMMDD, or latest\n"
    assert list(tmp_path.iterdir()) == []


def test_a_dump_that_is_there(tmp_path):
    page = "<page><title>A</title><ns>0</ns><id>1</id><revision><text>'''Text'''.</text></revision></page>"
    (tmp_path / "a.xml").write_text(f"<mediawiki>{page}</mediawiki>")
    done = call(tmp_path, "--dump", "a.xml", "--output", "out.jsonl", "--workers", "1")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.jsonl").read_text() == '{"id": "1", "url": "A", "title": "A", "text": "Text."}\n'
