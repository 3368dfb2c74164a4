"""FP8 by recipe, architecture and layout: megatron-core's own classes take what is resolved, the rest is refused."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import TransformerConfig

from megatron_rocm.config import read
from megatron_rocm.errors import UsageError
from megatron_rocm.model.build import ddp_config, optimizer_config, transformer_config
from megatron_rocm.plan.memory import lower_bound
from megatron_rocm.platform.fp8 import CHIPS, RECIPES
from megatron_rocm.platform.machine import GIB, TARGETS, Gpu, Machine, find
from megatron_rocm.platform.settings import LIBRARY_PREFIXES
from megatron_rocm.resolve import Resolution, resolve
from megatron_rocm.tune.shapes import gemms

HAS = {
    "mi300x": "delayed tensorwise", "mi325x": "delayed tensorwise", "mi355x": "delayed tensorwise mxfp8",
    "h100": "delayed tensorwise blockwise", "h200": "delayed tensorwise blockwise",
    "b200": "delayed tensorwise blockwise mxfp8", "mi250x": "", "a100": "", "cpu": "",
}  # fmt: skip
PAIRS = [(target, recipe) for target, recipes in HAS.items() for recipe in recipes.split()]
LACKING = [(target, recipe) for target, recipe in itertools.product(HAS, RECIPES) if recipe not in HAS[target].split()]
LAYOUTS = {
    "tp": "TP=8",
    "tp, no sequence parallel": "TP=4 SEQ_PARALLEL=0",
    "dp": "TP=1",
    "fsdp": "FSDP=1",
    "megatron fsdp": "MEGATRON_FSDP=1",
    "hsdp": "MEGATRON_FSDP=1 ENABLE_HSDP=1",
    "pp": "TP=2 PP=2 VPP=2",
    "cp": "TP=2 CP=2",
    "weights": "TP=2 FP8_PARAM_GATHER=1",
    "weights, one": "TP=8 FP8_PARAM_GATHER=1",
}


def resolved(*arguments: str, family: str = "llama3", machine: Machine | None = None) -> Resolution:
    request = read(family, arguments, {}, LIBRARY_PREFIXES)
    return resolve(request, machine or find(request.text("TARGET")), {}, dry_run=True)


def message(*arguments: str, **more: Any) -> str:
    with pytest.raises(UsageError) as caught:
        resolved(*arguments, **more)
    return str(caught.value)


@pytest.fixture(autouse=True)
def fused_rope(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one thing of Transformer Engine's that megatron-core's configuration looks for."""
    monkeypatch.setattr("megatron.core.models.common.embeddings.rope_utils.fused_apply_rotary_pos_emb", print)


def words(target: str, recipe: str, *more: str) -> list[str]:
    return [f"TARGET={target}", "MODEL_SIZE=8", "TE_FP8=1", f"TE_FP8_RECIPE={recipe}", *more]


def test_the_table_is_of_the_machines_there_are() -> None:
    assert set(HAS) == {*TARGETS, "cpu"}
    assert {recipe for chip in CHIPS.values() for recipe in chip.recipes} == set(RECIPES)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("target", "recipe"), PAIRS)
def test_megatron_cores_own_classes_take_it(target: str, recipe: str, layout: str) -> None:
    run = resolved(*words(target, recipe, *LAYOUTS[layout].split())).config
    transformer, ddp, optimizer = transformer_config(run), ddp_config(run), optimizer_config(run)
    assert isinstance(transformer, TransformerConfig)
    assert isinstance(ddp, DistributedDataParallelConfig) and isinstance(optimizer, OptimizerConfig)
    block = recipe in ("blockwise", "mxfp8")
    assert (transformer.fp8, transformer.fp8_recipe) == ("e4m3" if block else "hybrid", recipe)
    assert (transformer.fp8_amax_history_len, transformer.fp8_amax_compute_algo) == (1024, "max")
    assert transformer.bf16 and transformer.transformer_impl == "transformer_engine"
    assert optimizer.fp8_recipe == recipe
    assert transformer.disable_parameter_transpose_cache == ("fsdp" in layout or layout == "hsdp")
    gathers = layout.startswith("weights")
    assert transformer.fp8_param == ddp.fp8_param_gather == gathers
    shares = gathers and recipe == "mxfp8"
    assert ddp.reuse_grad_buf_for_mxfp8_param_ag == optimizer.reuse_grad_buf_for_mxfp8_param_ag == shares
    assert not (shares and ddp.overlap_param_gather)
    assert not gathers or ddp.use_distributed_optimizer and optimizer.use_distributed_optimizer


@pytest.mark.parametrize(("target", "recipe"), LACKING)
def test_what_a_gpu_has_not_is_refused_by_name_with_a_way_out(target: str, recipe: str) -> None:
    said = (
        message(*words(target, recipe))
        if target != "cpu"
        else message("TARGET=cpu", "TE_FP8=1", f"TE_FP8_RECIPE={recipe}")
    )
    assert "TE_FP8=0" in said
    if HAS[target]:
        assert said.startswith(f"TE_FP8_RECIPE={recipe} on ") and TARGETS[target].arch in said
        way_out = f"set TE_FP8_RECIPE={HAS[target].replace(' ', ' or ')},"
        assert way_out in said
        for choice in HAS[target].split():
            assert resolved(*words(target, choice)).config.fp8.recipe == choice
    else:
        assert said.startswith("TE_FP8=1 on ") and "TARGET=mi300x" in said


@pytest.mark.parametrize(
    ("target", "recipe", "why"),
    [
        ("mi250x", "delayed", "no FP8 in hardware"),
        ("a100", "delayed", "compute capability 8.9"),
        ("mi300x", "blockwise", "AMD's Transformer Engine has no products"),
        ("mi300x", "mxfp8", "gfx950"),
        ("h100", "mxfp8", "Blackwell"),
    ],
)
def test_the_message_says_why(target: str, recipe: str, why: str) -> None:
    assert why in message(*words(target, recipe))


def test_a_gpu_without_transformer_engine_is_told_how_to_get_it() -> None:
    machine = Machine("AMD Instinct MI300X", "amd", "gfx942", (Gpu(192 * GIB),), 2048 * GIB, 96, "torch")
    said = message("MODEL_SIZE=8", "TE_FP8=1", machine=machine)
    assert "Transformer Engine, which is not installed" in said and "docs/transformer_engine.md" in said


def test_an_unknown_gpu_is_refused() -> None:
    machine = Machine("AMD Radeon", "amd", "gfx1100", (Gpu(192 * GIB),), 2048 * GIB, 96, "te")
    assert "gfx942" in message("MODEL_SIZE=8", "TE_FP8=1", machine=machine)


REFUSED = [
    ("PRECISION=fp16", "with PRECISION=fp16", "PRECISION=bf16"),
    ("PRECISION=fp32", "with PRECISION=fp32", "PRECISION=bf16"),
    ("FP8_FIRST_LAST_LAYERS_BF16=1", "with TE_FP8_RECIPE=delayed", "TE_FP8_RECIPE=tensorwise"),
    ("TE_FP8_RECIPE=tensorwise FP8_FIRST_LAST_LAYERS_BF16=1 FP8_BF16_END=9 PP=4 TP=2", "at most the 8 layers",
     "FP8_BF16_END=8"),
    ("FP8_PARAM_GATHER=1 FSDP=1", "knows no FP8 weights", "FP8_PARAM_GATHER=0"),
    ("FP8_PARAM_GATHER=1 MEGATRON_FSDP=1", "not proven", "FP8_PARAM_GATHER=0"),
    ("FP8_PARAM_GATHER=1 USE_DISTRIBUTED_OPTIMIZER=0", "from the distributed optimizer's",
     "USE_DISTRIBUTED_OPTIMIZER=1 OPTIMIZER=adam"),
    ("FP8_PARAM_GATHER=1 OPTIMIZER=sgd", "OPTIMIZER=sgd", "OPTIMIZER=adam"),
    ("FP8_PARAM_GATHER=1 OPTIMIZER_CPU_OFFLOAD=1 TE_FP8_RECIPE=tensorwise", "offloads FP8 weights",
     "TE_FP8_RECIPE=delayed"),
    ("SEQ_LENGTH=8", "MBS·SEQ_LENGTH with CP=1 is 8", "SEQ_LENGTH=128"),
    ("SEQ_LENGTH=64 TP=8", "SEQ_PARALLEL=1 over TP=8 is 8", "SEQ_PARALLEL=0"),
]  # fmt: skip


@pytest.mark.parametrize(("more", "why", "way_out"), REFUSED)
def test_what_does_not_combine_is_refused_and_its_way_out_works(more: str, why: str, way_out: str) -> None:
    base = ["TARGET=mi300x", "MODEL_SIZE=8", "TE_FP8=1"]
    assert why in message(*base, *more.split())
    assert resolved(*base, *more.split(), *way_out.split()).config.fp8.enabled


@pytest.mark.parametrize(
    ("target", "recipe", "more", "unit"),
    [
        ("h100", "blockwise", "TP=8 SEQ_LENGTH=512", 128),  # 64 tokens a GPU are gathered
        ("b200", "mxfp8", "TP=1 SEQ_LENGTH=48", 32),
        ("mi355x", "mxfp8", "TP=1 SEQ_LENGTH=96", 128),
    ],
)
def test_recipes_with_blocks_want_whole_ones(target: str, recipe: str, more: str, unit: int) -> None:
    assert f"must be a multiple of {unit}" in message(*words(target, recipe, *more.split()))
    assert resolved(*words(target, "tensorwise", *more.split())).config.fp8.recipe == "tensorwise"


def test_a_matrix_that_tp_cuts_unevenly_is_named() -> None:
    seven = ["TARGET=mi355x", "MODEL_SIZE=7", "TE_FP8=1", "TE_FP8_RECIPE=mxfp8"]
    said = message(*seven, "TP=8", family="llama2")
    assert "the feed-forward size with TP=8 is 1376" in said and "multiple of 128: lower TP" in said
    assert resolved(*seven, "TP=2", family="llama2").config.parallel.tp == 2


def test_first_and_last_layers_stay_in_bf16() -> None:
    fields = ["FP8_FIRST_LAST_LAYERS_BF16=1", "FP8_BF16_START=2", "FP8_BF16_END=3"]
    config = transformer_config(resolved(*words("h100", "tensorwise", *fields)).config)
    assert config.first_last_layers_bf16
    assert (config.num_layers_at_start_in_bf16, config.num_layers_at_end_in_bf16) == (2, 3)


def test_history_format_and_cache_are_as_said() -> None:
    more = ["FP8_AMAX_HISTORY=4", "FP8_AMAX_ALGO=most_recent", "TE_FP8_FORMAT=e4m3", "FP8_TRANSPOSE_CACHE=0"]
    config = transformer_config(resolved(*words("mi300x", "delayed", *more)).config)
    assert (config.fp8, config.fp8_amax_history_len, config.fp8_amax_compute_algo) == ("e4m3", 4, "most_recent")
    assert config.disable_parameter_transpose_cache
    sharded = ddp_config(resolved(*words("mi300x", "tensorwise", "MEGATRON_FSDP=1", "FP8_TRANSPOSE_CACHE=1")).config)
    assert sharded.keep_fp8_transpose_cache


def test_off_unless_asked_for() -> None:
    for target in TARGETS:
        run = resolved(f"TARGET={target}", "MODEL_SIZE=8").config
        transformer, ddp, optimizer = transformer_config(run), ddp_config(run), optimizer_config(run)
        assert not run.fp8.enabled and run.training.spike_factor == 0
        assert (
            transformer.fp8 is None and not transformer.fp8_param and not transformer.disable_parameter_transpose_cache
        )
        assert optimizer.fp8_recipe is None and not ddp.fp8_param_gather


def test_it_watches_for_jumps_unless_told_otherwise() -> None:
    assert resolved(*words("h100", "delayed")).config.training.spike_factor == 2
    assert resolved(*words("h100", "delayed", "SPIKE_FACTOR=0")).config.training.spike_factor == 0


@pytest.mark.parametrize(
    ("more", "note"),
    [
        ("TE_FP8_RECIPE=mxfp8", "TE_FP8_RECIPE=mxfp8 has no effect without TE_FP8=1"),
        ("FP8_PARAM_GATHER=1", "FP8_PARAM_GATHER=1 has no effect without TE_FP8=1"),
        ("TE_FP8=1 FP8_BF16_END=3", "FP8_BF16_END=3 has no effect without TE_FP8=1 FP8_FIRST_LAST_LAYERS_BF16=1"),
        ("TE_FP8=1 TE_FP8_RECIPE=tensorwise FP8_AMAX_ALGO=max", "FP8_AMAX_ALGO=max has no effect without TE_FP8=1 TE_"),
        ("TE_FP8=1 FSDP=1 SAVE_CKPT_PATH=there", "its scales are not in checkpoints"),
        ("TE_FP8=1 TE_FP8_RECIPE=mxfp8 FP8_PARAM_GATHER=1 OVERLAP_PARAM_GATHER=1 TP=2", "OVERLAP_PARAM_GATHER=1 be"),
    ],
)  # fmt: skip
def test_what_has_no_effect_or_changes_is_told(more: str, note: str) -> None:
    assert any(note in line for line in resolved("TARGET=b200", "MODEL_SIZE=8", *more.split()).notes)


def test_the_folder_tells_the_precision() -> None:
    assert "/fp8/" in resolved(*words("h100", "delayed")).config.launch.log_dir


def test_megatron_cores_own_names_are_refused_for_ours() -> None:
    assert "set TE_FP8" in message("TARGET=h100", "MODEL_SIZE=8", "core.transformer.fp8=hybrid")


def test_weights_in_fp8_count_as_one_byte() -> None:
    plain, kept = (
        lower_bound(resolved(*words("h100", "delayed", *more)).config) for more in ([], ["FP8_PARAM_GATHER=1"])
    )
    assert kept.weights * 2 == plain.weights and kept.parameters == plain.parameters


def test_the_page_has_the_tables_rows() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/fp8.md").read_text()
    for arch, chip in CHIPS.items():
        assert f"| {chip.machines} ({arch}) | {chip.e4m3} | {', '.join(chip.recipes)} |" in page
    for name, recipe in RECIPES.items():
        assert re.search(rf"^\| `{name}`.* \| {recipe.scale} \| {recipe.unit['nvidia']}[ ;]", page, re.M)


def test_fp8_products_are_not_tuned() -> None:
    with pytest.raises(UsageError, match="Set TE_FP8=0 here"):
        gemms(resolved(*words("mi300x", "delayed")).config)
