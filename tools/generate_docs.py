#!/usr/bin/env python3
"""Write the pages of docs/ that are made from the program's own tables.

python tools/generate_docs.py            # writes them
python tools/generate_docs.py --check    # exit status 1 where one is out of date
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from urllib.parse import urlsplit

from megatron_rocm.config.changes import ASK, FREE, NEVER, ROWS, WARN
from megatron_rocm.config.others import OTHERS
from megatron_rocm.config.presets import PRESETS
from megatron_rocm.config.request import read
from megatron_rocm.config.schema import variables
from megatron_rocm.config.variable import NO_EFFECT, OURS, REFUSED, REPAIRED, WORKS
from megatron_rocm.errors import UsageError
from megatron_rocm.platform.machine import find
from megatron_rocm.platform.network import AINIC
from megatron_rocm.platform.settings import NOT_SET, SETTINGS, Setting
from megatron_rocm.platform.sources import Source
from megatron_rocm.platform.transformer_engine import NEEDS, PACKAGE, USES, Need
from megatron_rocm.resolve import resolve
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
    """Each setting with its reason, source and condition; then what is left alone."""
    rows = [
        (f"`{row.name}`", _value(row), _when(row), row.why + _OVER[row.over], _source(row.source)) for row in SETTINGS
    ]
    return "\n".join([
        MADE,
        "# Environment settings\n",
        "What the launcher sets for a run's processes where it applies; `DRY_RUN=1` prints what applies to a run. "
        "A value of your own wins, from the environment or as a `KEY=VALUE` argument; a row that wins over it says so. "
        "Where two recommendations contradict each other the condition decides, never the order: at most one row of a "
        "name applies to a run. Which network cards are used is in [network.md](network.md).\n",
        table(("name", "value", "when", "why", "source"), rows),
        "## With Pensando's network cards\n",
        "Over several nodes, and over the rows above; a value of your own wins.\n",
        table(
            ("name", "value", "why", "source"),
            [(f"`{row.name}`", f"`{row.value}`", row.why, _source(row.source)) for row in AINIC],
        ),
        "## Not set, and why\n",
        "What AMD's scripts, images and submissions set besides.\n",
        table(("name", "why not"), [(_names(names), why) for names, why in NOT_SET.items()]),
        "None of these was measured here on an AMD GPU: they are their sources' advice.\n",
    ])  # fmt: skip


_OVER = {
    "nothing": "",
    "environment": " (over the environment; a `KEY=VALUE` argument wins)",
    "all": " (over a value of yours)",
}


def _value(row: Setting) -> str:
    if not isinstance(row.value, str):
        return "computed"
    return f"`{row.value}`" if row.value else "taken away"


# Values of a condition's axes that do not speak for themselves.
WORDS = {
    "vendor": {"amd": "AMD", "nvidia": "NVIDIA", "cpu": "no GPU"},
    "blackwell": {"no": "not Blackwell"},
    "nodes": {"one": "one node", "several": "several nodes"},
    "tier": {"te": "Transformer Engine"},
    "layout": {"fsdp": "FSDP", "replicated": "without FSDP"},
    "fp8": {"no": "off"},
    "deterministic": {"yes": "DETERMINISTIC=1", "no": "not DETERMINISTIC=1"},
    "gemm_tuning": {"1": "GEMM_TUNING=1", "hipblaslt": "GEMM_TUNING=FILE", "tunableop": "GEMM_TUNING=FILE of torch's"},
    "target": {"cpu": "TARGET=cpu"},
}


def _when(row: Setting) -> str:
    """A row's condition in words."""
    parts = []
    for axis, values in row.when.items():
        named = " or ".join(WORDS.get(axis, {}).get(value, value) for value in values)
        parts.append(f"FP8 {named}" if axis == "fp8" else named)
    return "; ".join(parts) or "always"


def _source(source: Source) -> str:
    """A link to it, by a short name."""
    core = "https://github.com/NVIDIA/Megatron-LM/blob/core_r0.16.0/megatron/core/"
    prefix = {"here": "../", "megatron-core": core}.get(source.kind, "")
    names = {"file": f"{source.place} {Path(source.path).name}", "page": urlsplit(source.place).netloc}
    return f"[{names.get(source.kind, Path(source.place).name)}]({prefix}{source.link})"


def _names(names: str) -> str:
    """Variables of a sentence as code."""
    return re.sub(r"[A-Z0-9]+(?:_[A-Z0-9]+)+(?:_\*)?", lambda match: f"`{match[0]}`", names)


def transformer_engine_page() -> str:
    """Every symbol that megatron-core takes from Transformer Engine, by use."""
    parts = [
        MADE,
        "# What megatron-core 0.16.1 takes from Transformer Engine\n",
        "By what it is for; `megatron-rocm doctor` checks the installed one against the uses that a run of ours can "
        "come to. Which releases have what is in [transformer_engine.md](transformer_engine.md).\n",
    ]
    for ours, title in ((True, "What runs of ours can come to"), (False, "What they never come to")):
        parts.append(f"## {title}\n")
        rows = [
            (USES[need.use].what, f"`{need.name.removeprefix(f'{PACKAGE}.')}`", _asked(need), f"`{need.at}`",
             need.since or "any", USES[need.use].without)
            for need in NEEDS if USES[need.use].ours == ours
        ]  # fmt: skip
        head = ("for", f"{PACKAGE}.…", "called with", "by", "from version", "where it is missing")
        parts.append(table(head, rows))
    return "\n".join(parts)


def _asked(need: Need) -> str:
    parts = [f"{need.positional} by position"] if need.positional else []
    parts += [f"`{name}`" for name in need.keywords] + [f"`.{name}`" for name in need.members]
    return ", ".join(parts)


def rules_page() -> str:
    rows = [(", ".join(f"`{key}`" for key in rule.keys), rule.message) for rule in RULES]
    return "\n".join([
        MADE,
        "# What does not combine\n",
        "The messages of the rules that a request is checked against, in their order; `{…}` stands for the values.\n",
        table(("variables", "message"), rows),
    ])  # fmt: skip


def changes_page() -> str:
    rows = [(", ".join(f"`{name}`" for name in row.names), row.verdict, row.why) for row in ROWS]
    verdicts = {
        FREE: "The run goes on, and a line names the change.",
        WARN: "It goes on, and a warning names the change.",
        ASK: "It ends with exit status 2, unless `ALLOW_CHANGE` names the variable: `ALLOW_CHANGE=SEED,SPLIT`.",
        NEVER: "It ends with exit status 2.",
    }
    order = list(verdicts)
    return "\n".join([
        MADE,
        "# What may change between a checkpoint and the run that goes on from it\n",
        "A checkpoint holds the configuration of the run that saved it. A run that goes on from it compares its own, "
        "says what differs, and does as this table says. Names that are no variables follow from one (`NUM_LAYERS` "
        "from `MODEL_SIZE`).\n",
        table(("verdict", "what it means"), list(verdicts.items())),
        "With `FINETUNE=1`, and from a checkpoint of weights alone, only the rows on the model count.\n",
        table(("what", "verdict", "why"), sorted(rows, key=lambda row: -order.index(row[1]))),
    ])  # fmt: skip


# What is combined pairwise → the request for it.
FEATURES = {
    "TP": {"TP": "2"},
    "SP": {"TP": "2", "SEQ_PARALLEL": "1"},
    "PP": {"PP": "2"},
    "VPP": {"PP": "2", "VPP": "2"},
    "CP": {"CP": "2"},
    "distributed optimizer": {"USE_DISTRIBUTED_OPTIMIZER": "1"},
    "overlaps": {"OVERLAP_GRAD_REDUCE": "1", "OVERLAP_PARAM_GATHER": "1"},
    "FSDP": {"FSDP": "1"},
    "Megatron-FSDP": {"MEGATRON_FSDP": "1"},
    "HSDP": {"MEGATRON_FSDP": "1", "ENABLE_HSDP": "1"},
    "recompute, full": {"RECOMPUTE": "1", "RECOMPUTE_GRANULARITY": "full"},
    "recompute, uniform": {"RECOMPUTE": "1", "RECOMPUTE_METHOD": "uniform"},
    "recompute, selective": {"RECOMPUTE": "1", "RECOMPUTE_GRANULARITY": "selective"},
    "activation offload": {"CPU_OFFLOADING_NUM_LAYERS": "1"},
    "optimizer offload": {"OPTIMIZER_CPU_OFFLOAD": "1"},
    "FP16": {"PRECISION": "fp16"},
    "FP32": {"PRECISION": "fp32"},
    "SGD": {"OPTIMIZER": "sgd"},
    "BF16 reduction": {"GRAD_REDUCE_IN_BF16": "1"},
    "ramp-up": {"RAMPUP_BATCH_SIZE": "32 32 1000"},
    "tied embeddings": {"MODEL_SIZE": "1"},
    "document boundaries": {"RESET_ATTENTION_MASK": "1"},
    "deterministic": {"DETERMINISTIC": "1"},
}


def combinations_page() -> str:
    """Every pair of features, resolved: yes, or the number of the reason why not."""
    reasons: dict[str, int] = {}
    rows: list[tuple[object, ...]] = []
    names = list(FEATURES)
    for row, name in enumerate(names):
        cells = []
        for other in names[:row]:
            if any(FEATURES[name].get(key, value) != value for key, value in FEATURES[other].items()):
                cells.append("–")  # one variable, two values
                continue
            reason = refusal({**FEATURES[name], **FEATURES[other]})
            cells.append("yes" if reason is None else f"[{reasons.setdefault(reason, len(reasons) + 1)}]")
        rows.append((f"**{name}**", *cells, *("",) * (len(names) - 1 - row)))
    asks = ", ".join(
        f"{name}: `{' '.join(f'{key}={value}' for key, value in asked.items())}`" for name, asked in FEATURES.items()
    )
    return "\n".join([
        MADE,
        "# What combines with what\n",
        "Made by resolving every pair of requests for one node of eight MI300X with Transformer Engine: it says what a "
        "run says. A number stands for the reason below: the message that the run ends with, or the line with which "
        "it turns the weaker wish off. A dash: two values of one variable.\n",
        f"Asked for: {asks}.\n",
        table(("", *names[:-1]), rows),
        *(f"{number}. {reason}" for reason, number in reasons.items()),
        "",
    ])  # fmt: skip


def refusal(asked: dict[str, str]) -> str | None:
    """Why a request is refused or changed, or None."""
    said = {"MODEL_SIZE": "8", "TP": "1", "BS": "64", **asked}
    arguments = [f"{name}={value}" for name, value in said.items()]
    try:
        run = resolve(read("llama3", arguments, {}), find("mi300x"), dry_run=True)
    except UsageError as error:
        return str(error)
    changed = (note for note in run.notes if " becomes " in note)
    return next((note for note in changed if note.startswith(tuple(f"{name}=" for name in asked))), None)


def table(head: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


PAGES = {
    "variables.md": variables_page,
    "models.md": models_page,
    "environment.md": environment_page,
    "transformer_engine_symbols.md": transformer_engine_page,
    "rules.md": rules_page,
    "combinations.md": combinations_page,
    "changes.md": changes_page,
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
