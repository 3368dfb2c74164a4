"""Rows that pad the vocabulary change neither the loss nor a gradient, whatever is in them and however many."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import execute, tiny_run

PADDING = str(Path(__file__).with_name("padded_vocabulary.py"))
# Tokens, rows at TP=1 (a multiple of 128), rows at TP=2 (a multiple of 256). Of 100 tokens rank 1 has none.
SIZES = [(301, 384, 512), (100, 128, 256)]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_padding_is_as_if_not_there(tmp_path: Path, tied: bool) -> None:
    runs = []
    for tokens, alone, split in SIZES:
        common = {"vocab_size": tokens, "num_layers": 2, "tied_embeddings": tied}
        runs.append(tiny_run(tmp_path / f"{tokens}-1", **common, padded_vocab_size=alone, dp=2))
        runs.append(tiny_run(tmp_path / f"{tokens}-2", **common, padded_vocab_size=split, tp=2))
    for run in runs:
        Path(run.launch.log_dir).mkdir()
        run.save(Path(run.launch.log_dir) / "run.json")
    said = execute(runs[0], PADDING, *(f"{run.launch.log_dir}/run.json" for run in runs), timeout=500)
    found = next(json.loads(line) for line in said.splitlines() if line.startswith("[{"))
    assert len(found) == 2 * len(SIZES)  # both ranks
    for one in found:
        assert one["planted loss"] == one["planted gradient"] == one["gradient of padding"] == 0
        assert one["softmax"] < 2e-6
        assert one["tp loss"] < 2e-6 and one["tp gradient"] < 1e-5
