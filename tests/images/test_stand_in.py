"""What the stand-in for the vendors' images is made from: this machine's package sources, and no other settings."""

import pytest
from images import stand_in


def test_settings_of_pip_go_into_builds(tmp_path):
    index, wheels = tmp_path / "index" / "simple", tmp_path / "wheels"
    index.mkdir(parents=True)
    wheels.mkdir()
    listing = f"""\
:env:.cert='/elsewhere/ca.pem'
global.extra-index-url='https://a.example/simple file://{index}'
global.find-links='/not/there'
user.find-links='{wheels}'
global.require-virtualenv='true'
"""
    pip = stand_in.pip_settings(listing, "https://torch.example")
    assert pip.text == (
        f"[global]\ncert = {stand_in.CERTIFICATES}\n"
        f"extra-index-url = https://a.example/simple file://{index} https://torch.example\nfind-links = {wheels}\n"
    )
    assert pip.folders == (str(tmp_path / "index"), str(wheels))
    assert pip.volumes[:2] == ["--volume", f"{tmp_path}/index:{tmp_path}/index:ro"]


def test_the_mirror_is_that_of_the_release():
    targets = "http://x.example/debian-security bookworm-security main\nhttp://x.example/debian bookworm main\n"
    targets += "http://x.example/debian bookworm contrib\nhttp://other.example/ bookworm main\n"
    assert stand_in.mirror(targets, "bookworm") == stand_in.Mirror(
        "http://x.example/debian", "bookworm", "main,contrib"
    )
    with pytest.raises(SystemExit, match="no source for trixie"):
        stand_in.mirror(targets, "trixie")


def test_another_recipe_has_another_name(monkeypatch):
    pip = stand_in.Pip("", ("/wheels",))
    names = {
        stand_in.name("bookworm", pip),
        stand_in.name("trixie", pip),
        stand_in.name("bookworm", stand_in.Pip("", ())),
    }
    monkeypatch.setattr(stand_in, "torch_pin", lambda: "torch==9")
    assert len(names | {stand_in.name("bookworm", pip)}) == 4
    assert stand_in.name("bookworm", pip) == stand_in.name("bookworm", stand_in.Pip("timeout", ("/wheels",)))
