"""Addresses hold no secret, and nothing that is shown does."""

from __future__ import annotations

import pytest

from megatron_rocm.config import address
from megatron_rocm.config.request import read
from megatron_rocm.errors import UsageError


@pytest.mark.parametrize("variable", ["SAVE_CKPT_PATH", "LOAD_CKPT_PATH"])
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("s3://user:hunter2@bucket/path", "must not hold a login"),
        ("s3://hunter2@bucket/path", "must not hold a login"),
        ("s3://bucket/path?X-Amz-Signature=hunter2", "without query"),
        ("simplecache::s3://bucket/path", "scheme://bucket/path"),
        ("memory://bucket", "memory of one process"),
        ("s3://", "with a bucket"),
        ("s3://bucket//path", "no empty part"),
        ("s3://bucket/../other", "no empty part"),
    ],
)
def test_an_address_that_will_not_do_is_refused_without_showing_a_secret(variable: str, text: str, says: str) -> None:
    if text.startswith("simplecache"):  # no scheme at its beginning: a relative folder
        assert not address.is_remote(text)
        return
    with pytest.raises(UsageError, match=says) as refusal:
        read("llama3", [f"{variable}={text}"], {})
    assert "hunter2" not in str(refusal.value) and variable in str(refusal.value)


def test_an_address_has_one_spelling_and_a_folder_is_none() -> None:
    request = read("llama3", ["SAVE_CKPT_PATH=S3://bucket/run/", "LOAD_CKPT_PATH=/some/folder"], {})
    assert request.said["SAVE_CKPT_PATH"].value == "s3://bucket/run"
    assert not address.is_remote(request.said["LOAD_CKPT_PATH"].value)


def test_what_a_library_says_is_shown_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    shown = address.shown("can't reach http://me:pass@host:9000/b?X-Amz-Credential=abc with hunter2")
    assert shown == "can't reach http://***@host:9000/b?*** with ***"
