"""Variables without a field in the schema: the guide's that have no counterpart here, secrets, words to the launcher."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rocm.config.variable import NO_EFFECT, OURS, REFUSED, REPAIRED, WORKS


@dataclass(frozen=True)
class Other:
    """A variable of the guide's without a field here: what values pass, and what is said of the others."""

    name: str
    default: str
    help: str
    state: str
    note: str
    passes: tuple[str, ...] | None = None  # None: any value
    pattern: str = ""  # what a value has to look like


LATER = "not in this version"

OTHERS = (
    Other("MOCK_DATA", "", "1: mock data, 0: DATA_PATH is needed", WORKS, "older scripts' word for DATA_PATH unset", ("0", "1")),
    Other("DATA_DIR", "", "older scripts' folder for tokenizer files", NO_EFFECT, "prepare_dataset.sh's folder; the Hugging Face cache holds tokenizers"),
    Other("MCORE", "1", "megatron-core's models", NO_EFFECT, "there are no others upstream; MCORE=0 is refused", ("1",)),
    Other("CKPT_FORMAT", "torch_dist", "checkpoint format", REPAIRED, "torch_dist is the one there is: `torch` belongs to Megatron-LM's own trainer", ("torch_dist",)),
    Other("HF_TOKEN", "", "Hugging Face token for a gated tokenizer", WORKS, "from the environment only"),
    Other("WANDB_API_KEY", "", "turns Weights & Biases on", WORKS, "from the environment only; needs `pip install megatron-rocm[wandb]`"),
    Other("DDP_AVERAGE_IN_COLLECTIVE", "1", "average gradients inside the collective", NO_EFFECT, "the loss is divided once, by the step's token count, which is the same in every layout", ("0", "1")),
    Other("TE_FP4", "0", "FP4 through Transformer Engine", REFUSED, "a kernel of AMD's fork that upstream does not have", ("0",)),
    Other("TE_FP4_RECIPE", "nvfp4", "FP4 recipe", NO_EFFECT, "read with TE_FP4=1 only", ("nvfp4", "mxfp4")),
    Other("FP4_PARAM_GATHER", "0", "gather parameters in FP4", REFUSED, "FP4 has no counterpart upstream", ("0",)),
    Other("FP4_SELECTIVE_BF16", "0", "some layers in BF16", NO_EFFECT, "read with TE_FP4=1 only", ("0", "1")),
    Other("FP4_BF16_START", "2", "first layers in BF16", NO_EFFECT, "read with TE_FP4=1 only", pattern=r"\d+"),
    Other("FP4_BF16_END", "8", "last layers in BF16", NO_EFFECT, "read with TE_FP4=1 only", pattern=r"\d+"),
    Other("CONTI_PARAMS", "0", "contiguous parameters in local DDP", REFUSED, "upstream's gradient buffers are always contiguous; the option is gone", ("0",)),
    Other("ENABLE_PROFILING", "0", "torch profiler", REFUSED, f"profiling is {LATER}", ("0",)),
    Other("TARGET", "", "plan for another machine: mi250x mi300x mi325x mi355x a100 h100 h200 b200 cpu", OURS, "with DRY_RUN=1"),
    Other("DRY_RUN", "0", "1: print configuration, environment and command, start nothing", OURS, "", ("0", "1")),
)  # fmt: skip
