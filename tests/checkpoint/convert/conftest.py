"""Small checkpoints, made once by a process of their own, and a tokenizer."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rocm.config import schema
from megatron_rocm.config.schema import RunConfig

SHAPE = {
    "family": "llama3", "size": "tiny", "title": "test", "num_layers": 3, "hidden_size": 64, "ffn_hidden_size": 96,
    "num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 16, "vocab_size": 500, "padded_vocab_size": 512,
    "max_position_embeddings": 16384, "rotary_base": 500_000, "rope_scaling": True, "rope_scaling_factor": 8.0,
    "tied_embeddings": False,
}  # fmt: skip

MODELS = {
    "grouped": {},
    "tied": {"tied_embeddings": True, "rope_scaling_factor": 32.0, "kv_channels": 32},
    "llama2": {
        "family": "llama2", "num_query_groups": 4, "rope_scaling": False, "rope_scaling_factor": 1.0,
        "rotary_base": 10_000, "vocab_size": 512,
    },
    "layers_apart": {},
}  # fmt: skip
DTYPES = {"llama2": "bf16"}


def make_run(model: dict, dtype: str = "fp32", tokenizer: str | None = None) -> RunConfig:
    """A run of one process on a CPU."""
    rest = {
        "parallel": {
            "gpus_per_node": 1, "world_size": 1, "tp": 1, "pp": 1, "dp": 1, "sequence_parallel": False,
            "distributed_optimizer": True, "overlap_grad_reduce": False, "overlap_param_gather": False,
            "count_embedding_and_loss": False,
        },
        "precision": {"dtype": dtype, "flash_attention": False},
        "training": {"global_batch_size": 8, "num_micro_batches": 8, "seq_length": 64, "recompute_num_layers": None},
        "optimizer": {"lr": 1e-3, "min_lr": 1e-4, "lr_warmup_iters": 0, "lr_decay_iters": 12},
        "data": {"cache_path": None, "tokenizer_model": tokenizer, "eod": 1},
        "checkpoint": {},
        "logging": {"wandb": False},
        "hardware": {"vendor": "cpu", "arch": "", "gpu_memory": 0, "tier": "torch", "threads": 1},
        "launch": {"master_port": 6000, "log_dir": "experiment"},
    }  # fmt: skip
    return RunConfig.model_validate({"model": {**SHAPE, **model}, **rest})


@pytest.fixture
def shape():
    """A function that makes a Model section, with some fields changed."""
    return lambda **changes: schema.Model.model_validate({**SHAPE, **changes})


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<s>", "</s>", *(f"w{i}" for i in range(498))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("tokenizer")
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory, tokenizer) -> Path:
    """A folder of runs' checkpoint folders, by the names of MODELS."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name, model in MODELS.items():
        (root / name).mkdir()
        tokens = str(tokenizer) if name == "grouped" else None
        make_run(model, DTYPES.get(name, "fp32"), tokens).save(root / name / "run.json")
    subprocess.run([sys.executable, Path(__file__).with_name("save_models.py"), root], check=True, timeout=170)
    return root
