"""Checkpoints that Megatron-LM has saved: weights from all of them, the whole state from those for all layouts."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ROOT, execute, losses, tiny_run, train_all
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM

from megatron_rocm.checkpoint.megatron_lm import configuration
from megatron_rocm.cli import main
from megatron_rocm.errors import UsageError

BF16 = {"dp": 2, "dtype": "bf16"}
SHARDED = {**BF16, "distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
SAVED: dict[str, dict[str, Any]] = {
    "fully_reshardable": SHARDED,
    "dp_reshardable": SHARDED,
    "plain": BF16,
    "none": {"dp": 1, "tp": 2, "sequence_parallel": True},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("megatron_lm")
    runs = [tiny_run(folder / "of" / how, save=str(folder / how), **fields) for how, fields in SAVED.items()]
    for run in runs:
        Path(run.launch.log_dir).mkdir(parents=True)
        run.save(Path(run.launch.log_dir) / "run.json")
    files = [str(Path(run.launch.log_dir) / "run.json") for run in runs]
    execute(runs[0], str(ROOT / "tests/checkpoint/save_as_megatron_lm.py"), *files)
    return folder


@pytest.mark.timeout(300)
def test_training_goes_on(saved: Path, tmp_path: Path) -> None:
    """From the state of all layouts exactly, in the layout it was saved in and in another; from others without the
    optimizer's state, at the same sample and learning rate."""
    whole = {name: tiny_run(tmp_path / name / "whole", train_iters=6, **SAVED[name]) for name in ("plain", "none")}
    then = {
        name: tiny_run(tmp_path / name / "then", train_iters=6, load=str(saved / name), **SAVED[name])
        for name in ("fully_reshardable", "plain")
    }
    other = tiny_run(tmp_path / "tp", train_iters=6, load=str(saved / "plain"), tp=2, dtype="bf16")
    weights = {
        name: tiny_run(
            tmp_path / name / "without", train_iters=5, load=str(saved / name), no_load_optim=True, **SAVED[name]
        )
        for name in ("dp_reshardable", "none")
    }
    train_all(*whole.values(), *then.values(), other, *weights.values())
    for run in then.values():
        assert losses(run) == losses(whole["plain"])[3:]
    assert losses(other) == pytest.approx(losses(whole["plain"])[3:], abs=1e-3)
    assert losses(weights["none"])[0] == losses(whole["none"])[3]
    assert losses(weights["dp_reshardable"])[0] == losses(whole["plain"])[3]


def test_weights_alone_begin_anew(saved: Path, tmp_path: Path) -> None:
    common = {"train_iters": 2, "load": str(saved / "dp_reshardable"), "finetune": True}
    text = execute(tiny_run(tmp_path / "tuned", **common))
    assert (
        f"starting at iteration 0 and the first sample with the weights of {saved}/dp_reshardable/iter_0000003" in text
    )
    assert "iteration        1/       2 | consumed samples:            4" in text
    assert "has no manifest.json" in text


def test_what_does_not_fit(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = execute(tiny_run(tmp_path / "a", load=str(saved / "dp_reshardable"), **SHARDED), status=2)
    assert "only the layout which wrote it reads" in text and "NO_LOAD_OPTIM=1" in text and "FINETUNE=1" in text
    text = execute(tiny_run(tmp_path / "b", load=str(saved / "none"), hidden_size=128), status=2)
    assert "is of another run: HIDDEN_SIZE 64 → 128" in text
    larger = tiny_run(tmp_path / "c", load=str(saved / "none"), finetune=True, vocab_size=600, padded_vocab_size=640)
    assert "a vocabulary of 512 words at most, and this run's VOCAB_SIZE is 600" in execute(larger, status=2)
    assert main(["checkpoint", "show", str(saved / "plain")]) == 0
    told = capsys.readouterr().out
    assert "Megatron-LM" in told and "iteration 3, 12 samples consumed" in told


def test_export_to_hugging_face(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With all rows of the embedding, or those that a tokenizer has ids for."""
    whole = AutoModelForCausalLM.from_pretrained(exported(saved / "plain", tmp_path / "whole"))
    assert whole.config.rope_parameters["factor"] == 8.0 and whole.config.vocab_size == 512
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, 300)}}, "w2"))
    (tmp_path / "tokenizer").mkdir()
    tokenizer.save(str(tmp_path / "tokenizer/tokenizer.json"))
    words = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer/tokenizer_config.json").write_text(json.dumps(words))
    out = exported(saved / "plain", tmp_path / "cut", "--tokenizer", str(tmp_path / "tokenizer"))
    cut = AutoModelForCausalLM.from_pretrained(out)
    assert (cut.config.vocab_size, cut.config.eos_token_id) == (300, 1) and (out / "tokenizer.json").is_file()
    for name, weight in cut.state_dict().items():
        assert torch.equal(weight, whole.state_dict()[name][: len(weight)])
    release = shutil.copytree(saved / "plain/iter_0000003", tmp_path / "root/release").parent
    (release / "latest_checkpointed_iteration.txt").write_text("release")
    assert (exported(release, tmp_path / "released") / "model.safetensors").is_file()
    main(["convert", "megatron-to-hf", str(saved / "none"), str(tmp_path / "verified"), "--verify"])
    assert "the two sides agree at all" in capsys.readouterr().out


def exported(checkpoint: Path, out: Path, *options: str) -> Path:
    assert main(["convert", "megatron-to-hf", str(checkpoint), str(out), "--no-verify", *options]) == 0
    return out


def test_a_flipped_byte_is_found_by_the_files_own_checksums(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "verify", str(saved / "none")]) == 0
    file = max((saved / "none" / "iter_0000003").glob("*.distcp"), key=lambda path: path.stat().st_size)
    before = file.read_bytes()
    after = bytearray(before)
    after[len(after) // 2] ^= 1
    file.write_bytes(after)
    try:
        assert main(["checkpoint", "verify", str(saved / "none")]) == 1
    finally:
        file.write_bytes(before)
    assert f"{file.name}: " in capsys.readouterr().out


def test_another_network_is_named() -> None:
    llama = {"bf16": True, "fp16": False, "num_layers": 2, "swiglu": True, "normalization": "RMSNorm"}
    assert configuration(Namespace(**llama), Path("there"))["model"] == {"num_layers": 2}
    with pytest.raises(UsageError, match="another network than a Llama there: normalization=LayerNorm, num_experts=8"):
        configuration(Namespace(**{**llama, "normalization": "LayerNorm", "num_experts": 8}), Path("there"))


def test_the_older_format_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "saved" / "iter_0000100" / "mp_rank_00"
    folder.mkdir(parents=True)
    (folder / "model_optim_rng.pt").touch()
    (tmp_path / "saved" / "latest_checkpointed_iteration.txt").write_text("100")
    text = execute(tiny_run(tmp_path / "run", load=str(tmp_path / "saved")), status=2)
    assert "--ckpt-format torch_dist" in text and "Traceback" not in text
