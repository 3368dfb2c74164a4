"""RunRequest: only what was said, typed and checked by name, with where it was said."""

from __future__ import annotations

import difflib
import math
import os
import re
import shlex
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import TypeAdapter, ValidationError

from megatron_rocm.config import core_fields
from megatron_rocm.config.address import checked, is_remote
from megatron_rocm.config.blend import PATH_VARIABLES
from megatron_rocm.config.blend import parse as parse_paths
from megatron_rocm.config.others import OTHERS
from megatron_rocm.config.schema import variables
from megatron_rocm.config.variable import Variable
from megatron_rocm.config.yaml_file import read_yaml
from megatron_rocm.errors import UsageError

# A secret on a command line is readable by every user of the machine.
ENVIRONMENT_ONLY = ("HF_TOKEN", "WANDB_API_KEY")
ADDRESSES = ("SAVE_CKPT_PATH", "LOAD_CKPT_PATH")  # or folders
PATHS = ("LOG_DIR", *ADDRESSES, "LOCAL_CKPT_PATH", "DATA_CACHE_PATH", "TOKENIZER_MODEL", "GEMM_TUNING", *PATH_VARIABLES)


@dataclass(frozen=True)
class Said:
    """One value somebody gave: as typed, as text, and where."""

    value: Any
    text: str
    origin: str


@dataclass(frozen=True)
class RunRequest:
    """What was said for a run of `family`. `said` is keyed by variable name, `exports` are library settings.

    `layers` has the model cut to so many: no model to train, but one to compare layouts with.
    """

    family: str
    said: Mapping[str, Said]
    exports: Mapping[str, str]
    layers: int | None = None

    def text(self, name: str, default: str = "") -> str:
        """The value of `name` as text."""
        return self.said[name].text if name in self.said else default

    def command(self, **changes: str | int) -> str:
        """The line to type for this request with `changes`: a shell command, quoted; secrets are left out."""
        pairs = {
            name: said.text for name, said in self.said.items() if name not in (*ENVIRONMENT_ONLY, "DRY_RUN", "TARGET")
        }
        pairs |= dict(self.exports) | {name: str(value) for name, value in changes.items()}
        words = [f"{name}={shlex.quote(value)}" for name, value in pairs.items()]
        return " ".join([*words, "bash", f"examples/llama/train_{self.family}.sh"])


def read(
    family: str,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    library_prefixes: tuple[str, ...] = (),
) -> RunRequest:
    """The request of a command line. Arguments win over the environment, that over YAML files, later ones over earlier.

    `arguments` are KEY=VALUE pairs and names of YAML files with the same keys; a name that begins with one of
    `library_prefixes` is handed on to the run's processes. Raises UsageError for an unknown key or a wrong value.
    """
    pairs = [pair for argument in arguments if "=" not in argument for pair in _yaml(argument)]
    pairs += [(name, environment[name], "environment") for name in _NAMES if environment.get(name)]
    pairs += [(*argument.split("=", 1), "argument") for argument in arguments if "=" in argument]  # type: ignore[misc]
    texts: dict[str, tuple[str, str]] = {}
    exports = {}
    for name, text, origin in pairs:
        if name in ENVIRONMENT_ONLY and origin != "environment":
            raise UsageError(f"{name}: a secret given as an argument shows in the process list; say `export {name}=…`")
        if name in _NAMES or name.startswith(core_fields.PREFIX):
            texts[name] = (text, origin)
        elif name.startswith(library_prefixes) and library_prefixes:
            exports[name] = text
        else:
            raise UsageError(f"{name}={text}: unknown key ({origin}); {nearest(name, _NAMES)}")
    said = {}
    for name, (text, origin) in texts.items():
        if text:  # an empty value is an unset one, as in the guide's `${KEY:-default}`
            text = _at_home(text) if name in PATHS else text
            text = checked(name, text) if name in ADDRESSES and is_remote(text) else text
            said[name] = Said(_value(name, text), text, origin)
    return RunRequest(family, said, exports)


def _at_home(text: str) -> str:
    """Paths in `text` that begin with ~/ as a shell expands them; in quotes and in YAML none has."""
    return re.sub(r"(^|\s)~(?=/|$)", lambda match: match[1] + os.path.expanduser("~"), text)


def nearest(name: str, names: Iterable[str]) -> str:
    """A sentence that names what was probably meant."""
    close = difflib.get_close_matches(name.upper(), list(names), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else "`--help` lists every key"


def _yaml(file: str) -> list[tuple[str, str, str]]:
    """The keys of one YAML file as (name, text, origin)."""
    if not file.endswith((".yaml", ".yml")):
        raise UsageError(f"{file}: neither KEY=VALUE nor a .yaml file")
    content = read_yaml(file, file) or {}
    if not isinstance(content, dict) or any(isinstance(value, (dict, list)) for value in content.values()):
        raise UsageError(f"{file}: expected one `KEY: value` a line")
    return [
        (str(key), "" if value is None else str(int(value)) if isinstance(value, bool) else str(value), file)
        for key, value in content.items()
    ]


def _value(name: str, text: str) -> Any:
    """`text` as the type of variable `name`."""
    if any(ord(character) < 32 for character in text):
        raise UsageError(f"{name}={text!r}: control characters can't be part of a value")
    if name.startswith(core_fields.PREFIX):
        return core_fields.value(name, text)
    other = _OTHERS.get(name)
    if other is not None:
        if other.passes is not None and text not in other.passes:
            wanted = f"; {name} takes {' or '.join(other.passes)}" if other.passes else ""
            raise UsageError(f"{name}={text}: {other.note or 'wrong value'}{wanted}")
        if other.pattern and not re.fullmatch(other.pattern, text):
            raise UsageError(f"{name}={text}: must be a whole number ({other.help})")
        return text
    variable = _VARIABLES[name]
    if name in PATH_VARIABLES:
        return parse_paths(text, name)
    if name == "MODEL_SIZE":  # resolved against families
        return text
    try:
        value = _adapter(variable).validate_python(text.replace(",", " ").split() if _is_list(variable) else text)
    except ValidationError:
        raise UsageError(f"{name}={text}: must be {describe(variable)} ({variable.help})") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{name}={text}: must be {describe(variable)} ({variable.help})")
    return value


def _is_list(variable: Variable) -> bool:
    kinds = typing.get_args(variable.info.annotation)
    return typing.get_origin(variable.info.annotation) is tuple or any(
        typing.get_origin(kind) is tuple for kind in kinds
    )


def _adapter(variable: Variable) -> TypeAdapter[Any]:
    kind: Any = variable.info.annotation
    for limit in variable.info.metadata:
        kind = typing.Annotated[kind, limit]
    return TypeAdapter(kind)


def describe(variable: Variable) -> str:
    """The values a variable takes, in words."""
    kind: Any = variable.info.annotation
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(typing.get_args(kind))
    meta = variable.info.json_schema_extra
    if isinstance(meta, dict) and meta.get("values"):
        return str(meta["values"])
    words = {int: "a whole number", float: "a number", bool: "0 or 1"}.get(kind, "text")
    limits = []
    for limit in variable.info.metadata:
        for of, attribute, phrase in _LIMITS:
            if isinstance(limit, of):
                limits.append(f"{phrase} {getattr(limit, attribute)}")
    return " ".join([words, " and ".join(limits)]).strip()


_LIMITS = ((Ge, "ge", "of at least"), (Gt, "gt", "above"), (Le, "le", "of at most"), (Lt, "lt", "below"))
_VARIABLES = {variable.name: variable for variable in variables()}
_OTHERS = {other.name: other for other in OTHERS}
_NAMES = (*_VARIABLES, *_OTHERS)
