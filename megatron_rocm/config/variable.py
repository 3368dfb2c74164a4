"""How a variable that people can type is declared: its name, state, default and note beside its field."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

# What a variable that AMD's guide knows does here.
WORKS = "works"  # as users of the guide know it
REPAIRED = "repaired"  # works, where the guide's scripts get it wrong
NO_EFFECT = "accepted without effect"
REFUSED = "refused"
OURS = "ours"  # not in the guide

MOST = 10**9  # of steps, seconds, samples and tokens of a sequence
MOST_PROCESSES = 65_536
BY_RULE: Any = PydanticUndefined  # no default: `resolve` computes it; `default_text` says how


class Section(BaseModel):
    """A part of the schema: one concern's fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


@dataclass(frozen=True)
class Variable:
    """One name people can type, as KEY=VALUE, in the environment or in a YAML file."""

    name: str
    section: str
    help: str
    default: Any
    default_text: str
    state: str
    note: str
    info: FieldInfo


def var(
    name: str,
    default: Any,
    help: str,
    *,
    text: str = "",
    state: str = WORKS,
    note: str = "",
    values: str = "",
    **limits: Any,
) -> Any:
    """A field that people set as `name`. `text` describes a default that is computed, `values` what passes `limits`,
    which go to pydantic."""
    meta: JsonDict = {"var": name, "text": text, "state": state, "note": note, "values": values}
    return Field(default, description=help, json_schema_extra=meta, **limits)
