"""Addresses of remote stores: which texts are some, that they hold no secret, and how they are shown."""

from __future__ import annotations

import os
import re

from megatron_rocm.errors import UsageError

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_LOGIN = re.compile(r"(?<=://)[^/@\s]*@")
_QUERY = re.compile(r"(://[^\s?]*)\?[^\s\"')]*")
# What a message of a library could repeat.
SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID", "AZURE_STORAGE_KEY")
LONGEST = 1000  # characters: S3's keys have at most 1024


def is_remote(text: str | None) -> bool:
    """Whether it is an address, `scheme://…`, and no folder."""
    return bool(text and _SCHEME.match(text))


def shown(text: str) -> str:
    """`text` without what could be a secret: logins and queries of addresses, the values of `SECRETS`."""
    for name in SECRETS:
        if value := os.environ.get(name):
            text = text.replace(value, "***")
    return _QUERY.sub(r"\1?***", _LOGIN.sub("***@", text))


def checked(variable: str, text: str) -> str:
    """A remote address in its one spelling: no `/` at its end. Raises UsageError, which shows no secret."""
    said = f"{variable}={shown(text)}"
    scheme, _, rest = text.partition("://")
    if "@" in rest.partition("/")[0]:
        raise UsageError(
            f"{said}: an address must not hold a login, as it shows in logs and process lists. Leave it out; "
            "credentials come from the environment or the store's own files (AWS_ACCESS_KEY_ID, ~/.aws/credentials, …)"
        )
    if "?" in rest or "#" in rest or "::" in text:
        raise UsageError(f"{said}: an address is scheme://bucket/path, without query, fragment or chain of schemes")
    if scheme == "memory":
        raise UsageError(f"{said}: memory of one process, which no other sees; name a store, or a folder")
    parts = rest.strip("/").split("/")
    if not parts[0] or ".." in parts or "" in parts or len(text) > LONGEST:
        raise UsageError(f"{said}: an address is scheme://bucket/path, with a bucket and no empty part or `..`")
    return f"{scheme.lower()}://{rest.rstrip('/')}"


def local_name(address: str) -> str:
    """A relative path of a folder for an address's own copies: `s3/bucket/path`."""
    scheme, _, rest = address.partition("://")
    return "/".join([scheme.replace("+", "-"), *filter(None, rest.split("/"))])
