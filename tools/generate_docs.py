#!/usr/bin/env python3
"""Write the pages of docs/ that are made from the program's own tables.

python tools/generate_docs.py            # writes them
python tools/generate_docs.py --check    # exit status 1 where one is out of date
"""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_rocm.config.others import OTHERS
from megatron_rocm.config.presets import PRESETS
from megatron_rocm.config.schema import NO_EFFECT, OURS, REFUSED, REPAIRED, WORKS, variables
from megatron_rocm.platform.settings import GEMM_TUNING, SETTINGS
from megatron_rocm.resolve.rules import RULES

DOCS = Path(__file__).resolve().parent.parent / "docs"
MADE = "<!-- made by tools/generate_docs.py -->\n"


def variables_page() -> str:
    """Each variable of the guide and of ours, with its state."""
    rows = [(v.name, v.default_text, v.help, v.state, v.note) for v in variables()]
    rows += [(o.name, o.default or "unset", o.help, o.state, o.note) for o in OTHERS]
    states = {
        WORKS: "Works as users of AMD's guide know it",
        REPAIRED: "Repaired: the guide's scripts get it wrong",
        OURS: "Ours, beside the guide's",
        NO_EFFECT: "Accepted without effect",
        REFUSED: "Refused when turned on",
    }
    parts = [
        MADE,
        "# Variables\n",
        "Give them in the environment, as `KEY=VALUE` arguments or as `KEY: value` in a YAML file whose name is an "
        "argument; arguments win over the environment, the environment over files. A switch takes `1` or `0`. Names "
        "that begin with a library's prefix (`NCCL_`, `RCCL_`, `NVTE_`, `HSA_`, …) are handed on to the processes.\n",
        "`core.transformer.<field>=`, `core.optimizer.<field>=` and `core.ddp.<field>=` set fields of megatron-core's "
        "own TransformerConfig, OptimizerConfig and DistributedDataParallelConfig that no variable names.\n",
        "An unknown key, a wrong value or an impossible combination ends with exit status 2 before a process starts.\n",
    ]
    for state, title in states.items():
        parts.append(f"## {title}\n")
        parts.append(table(("variable", "default", "what it is", "note"), [
            (f"`{name}`", default, what, note) for name, default, what, of, note in rows if of == state
        ]))  # fmt: skip
    return "\n".join(parts)


def models_page() -> str:
    rows = []
    for (family, size), preset in PRESETS.items():
        shape = (preset.num_layers, preset.hidden_size, preset.ffn_hidden_size)
        heads = f"{preset.num_attention_heads}/{preset.num_query_groups}"
        rope = (preset.rotary_base, preset.rope_scaling_factor or "none")
        sets = ", ".join(f"{name}={value}" for name, value in preset.defaults.items())
        rows.append((f"`{size}`", preset.title, f"`train_{family}.sh`", *shape, heads, preset.vocab_size, *rope, sets))
    head = ("MODEL_SIZE", "model", "script", "layers", "hidden", "ffn", "heads/kv", "vocabulary", "rotary base",
            "RoPE scaling", "sets")  # fmt: skip
    return "\n".join([MADE, "# Models\n", table(head, rows)])


def environment_page() -> str:
    rows = [
        (
            f"`{row.name}`",
            f"`{row.value}`" if isinstance(row.value, str) else "computed",
            row.why + " (forced)" * row.forced,
            row.source,
        )
        for row in (*SETTINGS, *GEMM_TUNING)
    ]
    return "\n".join([
        MADE,
        "# Environment settings\n",
        "What the launcher sets for a run's processes where it applies; `DRY_RUN=1` prints what applies to a run. "
        "A value of your own wins, but where the row says forced.\n",
        table(("name", "value", "why", "source"), rows),
    ])  # fmt: skip


def rules_page() -> str:
    rows = [(", ".join(f"`{key}`" for key in rule.keys), rule.message) for rule in RULES]
    return "\n".join([
        MADE,
        "# What does not combine\n",
        "The messages of the rules that a request is checked against, in their order; `{…}` stands for the values.\n",
        table(("variables", "message"), rows),
    ])  # fmt: skip


def table(head: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


PAGES = {
    "variables.md": variables_page,
    "models.md": models_page,
    "environment.md": environment_page,
    "rules.md": rules_page,
}


def main(arguments: list[str]) -> int:
    """Write or check the pages; the number of stale ones is the exit status when checking."""
    stale = []
    for name, page in PAGES.items():
        path, text = DOCS / name, page()
        if "--check" not in arguments:
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            stale.append(name)
            print(f"docs/{name} is out of date: python tools/generate_docs.py", file=sys.stderr)
    return len(stale)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
