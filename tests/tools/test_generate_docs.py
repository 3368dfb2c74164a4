"""The made pages are current, and every variable of AMD's guide has a state."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# The guide's variables: ROCm/Megatron-LM examples/llama/train_llama2.sh and train_llama3.sh.
GUIDE = """
EXP_NAME TEE_OUTPUT NO_TRAINING LOG_DIR MASTER_ADDR MASTER_PORT NNODES NODE_RANK MODEL_SIZE TP PP CP SEQ_PARALLEL MBS BS
SEQ_LENGTH TOTAL_ITERS TE_FP8 TE_FP8_RECIPE FP8_PARAM_GATHER FP8_TRANSPOSE_CACHE GEMM_TUNING MCORE OPTIMIZER FSDP
MEGATRON_FSDP RECOMPUTE RECOMPUTE_NUM_LAYERS ROPE_FUSION CONTI_PARAMS USE_FLASH_ATTN ENABLE_PROFILING TOKENIZER_TYPE
TOKENIZER_MODEL HF_TOKEN DATA_PATH MOCK_DATA DATA_CACHE_PATH LOG_INTERVAL EVAL_INTERVAL SAVE_INTERVAL EVAL_ITERS
SAVE_CKPT_PATH CKPT_FORMAT LOAD_CKPT_PATH WANDB_API_KEY TE_FP4 TE_FP4_RECIPE FP4_PARAM_GATHER FP4_SELECTIVE_BF16
FP4_BF16_START FP4_BF16_END GRADIENT_ACCUMULATION_FUSION DDP_AVERAGE_IN_COLLECTIVE CROSS_ENTROPY_LOSS_FUSION
CROSS_ENTROPY_FUSION_IMPL FUSED_SINGLE_QKV_ROPE GRAD_REDUCE_IN_BF16 ENABLE_HSDP HSDP_NUM_REPLICAS DATA_DIR
""".split()


def generator():
    spec = importlib.util.spec_from_file_location("generate_docs", ROOT / "tools/generate_docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_are_current():
    assert generator().main(["--check"]) == 0


def test_a_remark_is_no_refusal():
    assert generator().refusal({"PRECISION": "fp16", "TP": "2"}) is None


def test_a_changed_wish_is_a_refusal():
    assert "becomes" in generator().refusal({"FSDP": "1", "TP": "2"})


def test_every_variable_of_the_guide_has_a_state():
    page = generator().variables_page()
    assert [name for name in GUIDE if f"| `{name}` |" not in page] == []
