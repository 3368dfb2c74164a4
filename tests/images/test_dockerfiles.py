"""The Dockerfiles without building them: the same but for the vendor, with nothing in them that should not be."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_rocm

ROOT = Path(__file__).parents[2]
FILES = {kind: (ROOT / f"Dockerfile.{kind}").read_text() for kind in ("rocm", "cuda")}
WORDS = {"rocm": ("AMD's", "rocm", "ROCM_IMAGE"), "cuda": ("NVIDIA's", "cuda", "CUDA_IMAGE")}


def without_vendor(kind: str) -> str:
    text = re.sub(r"^(ARG \w+_IMAGE)=\S+$", r"\1=…", FILES[kind], flags=re.MULTILINE)
    text = text.replace("megatron-rocm", "megatron")
    for place, word in enumerate(WORDS[kind]):
        text = re.sub(rf"\b{word}\b", f"<{place}>", text)
    return text


def test_they_differ_in_the_vendor_alone():
    assert without_vendor("rocm") == without_vendor("cuda")


@pytest.mark.parametrize("kind", FILES)
def test_the_base_is_pinned_by_tag_and_can_be_named(kind):
    argument = WORDS[kind][2]
    (image,) = re.findall(rf"^ARG {argument}=(\S+)$", FILES[kind], re.MULTILINE)
    registry, _, tag = image.partition(":")
    assert "." in registry.partition("/")[0] and tag and tag != "latest"
    assert set(re.findall(r"^FROM (\S+)", FILES[kind], re.MULTILINE)) == {f"${{{argument}}}"}


@pytest.mark.parametrize("kind", FILES)
def test_it_runs_as_somebody_who_is_not_root_and_asks_doctor(kind):
    assert re.findall(r"^USER (\S+)$", FILES[kind], re.MULTILINE)[-1] == "10001"
    (health,) = re.findall(r"^HEALTHCHECK .*CMD (.*)$", FILES[kind], re.MULTILINE)
    assert health == '["megatron-rocm", "doctor"]'


@pytest.mark.parametrize("kind", FILES)
def test_its_version_is_the_packages(kind):
    assert re.findall(r"^ARG VERSION=(\S+)$", FILES[kind], re.MULTILINE) == [megatron_rocm.__version__]


@pytest.mark.parametrize("kind", FILES)
def test_what_it_copies_is_there_and_not_ignored(kind):
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    assert rules[0] == "*"
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", FILES[kind], re.MULTILINE)
    sources = {source for line in copied for source in line.split()}
    assert sources and {source.partition("/")[0] for source in sources} == allowed
    assert [source for source in sources if not (ROOT / source).exists()] == []


@pytest.mark.parametrize("kind", FILES)
def test_no_secret_can_get_into_a_layer(kind):
    """Tokens come at run time, by name; pip's settings by a secret mount, which leaves nothing."""
    assert not re.search(r"^(ARG|ENV) .*(TOKEN|KEY|PASSWORD|SECRET|INDEX)", FILES[kind], re.MULTILINE | re.IGNORECASE)
    installs = re.findall(r"^RUN (?:.*\\\n)*.*$", FILES[kind], re.MULTILINE)
    asking = [run for run in installs if re.search(r"pip (install -c|wheel)", run)]
    assert len(asking) == 2 and all("--mount=type=secret,id=pip," in run for run in asking)


@pytest.mark.parametrize("kind", FILES)
def test_hadolint_has_nothing_to_say(kind):
    program = Path(sys.executable).parent / "hadolint"
    found = shutil.which(str(program)) or shutil.which("hadolint")
    assert found, "hadolint is of the extra dev"
    done = subprocess.run([found, str(ROOT / f"Dockerfile.{kind}")], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")
