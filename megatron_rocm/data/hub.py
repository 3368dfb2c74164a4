"""The files of a tokenizer, from a folder, the local Hugging Face cache, or the hub; each failure in plain words."""

from __future__ import annotations

import os
import re
import ssl
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from megatron_rocm.errors import UsageError

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# Small files first: a cached tokenizer.json then has its companions.
COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json")
MAIN_FILES = {"HuggingFaceTokenizer": ("tokenizer.json", "tokenizer.model"), "Llama2Tokenizer": ("tokenizer.model",)}
SHELL_TRUE = ("1", "on", "yes", "true")


@dataclass(frozen=True)
class TokenizerFiles:
    """`main` is a tokenizer.json or a SentencePiece tokenizer.model; its companions lie beside it."""

    main: Path

    @property
    def sentencepiece(self) -> bool:
        return self.main.suffix != ".json"

    def companion(self, name: str) -> Path | None:
        path = self.main.with_name(name)
        return path if path.is_file() else None


def is_hub_name(model: str) -> bool:
    """Whether `model` names a hub repository: no such path here, and the form `owner/name`."""
    return bool(HUB_NAME.fullmatch(model)) and not Path(model).exists()


def find_files(model: str, type: str, offline: bool = False) -> TokenizerFiles:
    """Find or download a tokenizer's files. Raises UsageError naming TOKENIZER_MODEL and the way out."""
    path = Path(model).expanduser()
    if path.is_dir():
        return _in_folder(path, model, type)
    if path.is_file():
        if type == "Llama2Tokenizer" and path.suffix == ".json":
            raise UsageError(
                f"TOKENIZER_MODEL={model}: Llama2Tokenizer reads a SentencePiece tokenizer.model; "
                "for a tokenizer.json set TOKENIZER_TYPE=HuggingFaceTokenizer"
            )
        return TokenizerFiles(path)
    if not HUB_NAME.fullmatch(model):
        raise UsageError(
            f"TOKENIZER_MODEL={model}: no such folder or file. Give a folder with a tokenizer.json, "
            "or a hub name such as NousResearch/Meta-Llama-3-8B"
        )
    snapshot = _cached(model)
    if snapshot is not None:
        for name in MAIN_FILES[type]:
            if (snapshot / name).is_file():
                return TokenizerFiles(snapshot / name)
    if offline or os.environ.get("HF_HUB_OFFLINE", "").lower() in SHELL_TRUE:
        raise UsageError(
            f"TOKENIZER_MODEL={model}: not in the Hugging Face cache, and this run is offline. "
            f"Download it where there is a network (hf download {model} --include 'tokenizer*'), "
            "or give the folder of a local copy"
        )
    return _download(model, type)


def _in_folder(folder: Path, model: str, type: str) -> TokenizerFiles:
    for name in MAIN_FILES[type]:
        if (folder / name).is_file():
            return TokenizerFiles(folder / name)
    wanted = " or ".join(MAIN_FILES[type])
    raise UsageError(
        f"TOKENIZER_MODEL={model}: the folder holds no {wanted}. Save a fast tokenizer there: "
        f"AutoTokenizer.from_pretrained(…).save_pretrained({model!r})"
    )


def _cached(name: str) -> Path | None:
    """The cached snapshot of a repository's main branch, by the cache's documented layout: no import, no network."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
    folder = Path(os.path.expandvars(cache)).expanduser() / f"models--{name.replace('/', '--')}"
    try:
        snapshot = folder / "snapshots" / (folder / "refs" / "main").read_text().strip()
    except OSError:
        return None
    whole = (snapshot / "tokenizer_config.json").is_file() or (snapshot / "tokenizer.model").is_file()
    return snapshot if whole else None


def _download(name: str, type: str) -> TokenizerFiles:
    try:
        from huggingface_hub import constants, hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError:
        raise UsageError(
            f"TOKENIZER_MODEL={name}: downloading it needs huggingface_hub: pip install huggingface_hub"
        ) from None
    endpoint = os.environ.get("HF_ENDPOINT") or constants.ENDPOINT
    _check_reachable(name, endpoint)
    found = None
    try:
        for file in (*COMPANIONS, *MAIN_FILES[type]):
            try:
                path = Path(hf_hub_download(name, file, endpoint=endpoint))
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError:
                continue
            if file in MAIN_FILES[type]:
                found = TokenizerFiles(path)
                break
    except Exception as error:  # the hub client's errors have no common base, and every one must be told in one line
        raise UsageError(_explain(name, error)) from None
    if found is None:
        wanted = " or ".join(MAIN_FILES[type])
        raise UsageError(
            f"TOKENIZER_MODEL={name}: the repository holds no {wanted}. Name one that does, or save a fast tokenizer "
            "to a folder and give that"
        )
    return found


def _check_reachable(name: str, endpoint: str) -> None:
    """Say at once that there is no way to the hub: its client tries again for half a minute before it gives up."""
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=10).close()
    except urllib.error.HTTPError:
        return
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLError):
            return  # the client has certificates of its own
        raise UsageError(_unreachable(name, f"can't be reached ({reason})")) from None


def _unreachable(name: str, what: str) -> str:
    hub = os.environ.get("HF_ENDPOINT") or "the Hugging Face hub"
    return (
        f"TOKENIZER_MODEL={name}: {hub} {what}, and the tokenizer is not in the local cache. "
        "Check the network, HF_ENDPOINT and the proxy, or give the folder of a local copy"
    )


# By class name along the exception's bases, first match wins: the classes moved between versions of huggingface_hub.
EXPLANATIONS = (
    (
        "GatedRepoError",
        "the repository is gated. Accept its licence on the hub, and set HF_TOKEN to a token of your account",
    ),
    (
        "RepositoryNotFoundError",
        "no such folder here, and no such repository on the hub, or a private one. Check the name; a private one "
        "needs HF_TOKEN",
    ),
    ("HFValidationError", "is not a valid hub name (owner/name)"),
    ("OfflineModeIsEnabled", "the hub client is offline. Unset HF_HUB_OFFLINE, or give the folder of a local copy"),
)


def _explain(name: str, error: Exception) -> str:
    classes = {base.__name__ for base in type(error).__mro__}
    for kind, text in EXPLANATIONS:
        if kind in classes:
            return f"TOKENIZER_MODEL={name}: {text}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return (
            f"TOKENIZER_MODEL={name}: the hub refused access (HTTP {status}). Check HF_TOKEN and the account's rights"
        )
    return _unreachable(name, f"answered HTTP {status}" if status else f"failed ({type(error).__name__})")
