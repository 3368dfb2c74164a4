"""The text of `--help`: every variable with its default and meaning, from the schema."""

from __future__ import annotations

import textwrap

from megatron_rocm.config.others import OTHERS
from megatron_rocm.config.presets import sizes
from megatron_rocm.config.schema import variables
from megatron_rocm.config.variable import NO_EFFECT, REFUSED

WIDTH = 118
_SCRIPT = "examples/llama/train_{family}.sh"


def help_text(family: str) -> str:
    """What train_<family>.sh takes."""
    script = _SCRIPT.format(family=family)
    parts = [
        f"Train {'Llama 2 or Code Llama' if family == 'llama2' else 'Llama 3, 3.1 or 3.2'} with megatron-core.\n\n"
        f"  bash {script} [KEY=VALUE …] [FILE.yaml …]\n"
        f"  KEY=VALUE bash {script}\n\n"
        "An argument wins over the environment, the environment over a file. Switches take 1 and 0.\n"
        "core.transformer.<field>=, core.optimizer.<field>= and core.ddp.<field>= set megatron-core's own fields.\n"
        f"MODEL_SIZE: {', '.join(sizes(family))}"
    ]
    rows: dict[str, list[tuple[str, str, str]]] = {}
    for variable in variables():
        rows.setdefault(variable.section, []).append((variable.name, variable.default_text, variable.help))
    for section, lines in rows.items():
        parts.append(_block(section, lines))
    usable = [other for other in OTHERS if other.state not in (NO_EFFECT, REFUSED)]
    parts.append(_block("also", [(other.name, other.default or "unset", other.help) for other in usable]))
    for state in (NO_EFFECT, REFUSED):
        told = [(other.name, other.default, other.note) for other in OTHERS if other.state == state]
        parts.append(_block(state if state == NO_EFFECT else f"{state}, other than at the default", told))
    return "\n\n".join(parts)


def _block(title: str, rows: list[tuple[str, str, str]]) -> str:
    lines = [title]
    for name, default, meaning in rows:
        text = f"{meaning} [{default}]"
        lines += textwrap.wrap(
            text, WIDTH, initial_indent=f"  {name:<29}", subsequent_indent=" " * 31, break_long_words=False
        )
    return "\n".join(lines)
