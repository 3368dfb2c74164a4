from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support import tiny_run

from megatron_rocm.config.changes import ALLOWABLE, ASK, FREE, NEVER, ROWS, WARN, changes, check, unknown_names
from megatron_rocm.config.schema import RunConfig
from megatron_rocm.errors import UsageError


def saved(**fields: Any) -> dict[str, Any]:
    return tiny_run(**fields).model_dump(mode="json", exclude={"launch"})


def test_every_field_that_is_saved_has_one_row() -> None:
    rows = [(row.section, field) for row in ROWS for field in row.fields.split()]
    fields = [
        (section, field)
        for section, info in RunConfig.model_fields.items()
        for field in info.annotation.model_fields  # type: ignore[union-attr]
        if section != "launch"
    ]
    assert sorted(rows) == sorted(fields)


# One change of each verdict, and by section one at least.
CASES = [
    ({"hidden_size": 128}, "HIDDEN_SIZE 64 → 128", NEVER),
    ({"rotary_base": 10_000}, "ROTARY_BASE 500000 → 10000", ASK),
    ({"tp": 2}, "TP 1 → 2", FREE),
    ({"dtype": "bf16"}, "PRECISION fp32 → bf16", ASK),
    ({"global_batch_size": 8}, "BS 4 → 8", WARN),
    ({"seed": 5}, "SEED 1234 → 5", ASK),
    ({"seq_length": 16}, "SEQ_LENGTH 32 → 16", ASK),
    ({"name": "sgd"}, "OPTIMIZER adam → sgd", NEVER),
    ({"lr": 1e-4}, "LR 0.003 → 0.0001", WARN),
    ({"split": "98,2,0"}, "SPLIT 99,1,0 → 98,2,0", ASK),
    ({"eod_mask_loss": True}, "EOD_MASK_LOSS 0 → 1", WARN),
    ({"save_interval": "7"}, "SAVE_INTERVAL 5000 → 7", FREE),
    ({"eval_iters": 3}, "EVAL_ITERS -1 → 3", FREE),
    ({"transformer": {"layernorm_epsilon": 1e-6}}, "core.transformer {} → {'layernorm_epsilon': 1e-06}", WARN),
]


@pytest.mark.parametrize(
    ("fields", "text", "verdict"), CASES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_change_is_said_and_judged(fields: dict[str, Any], text: str, verdict: str) -> None:
    run = tiny_run(**fields)
    found = {str(change): change.row.verdict for change in changes(saved(), run.model_dump(mode="json"))}
    assert found[text] == verdict
    if verdict in (NEVER, ASK):
        with pytest.raises(UsageError, match="ALLOW_CHANGE=" if verdict == ASK else "of another run"):
            check(run, saved(), Path("there"))
    elif not text.startswith("SAVE_"):  # where is saved is not told
        notes = check(run, saved(), Path("there"))
        assert any(text in note and note.startswith("warning") == (verdict == WARN) for note in notes)


def test_no_change_says_nothing() -> None:
    assert check(tiny_run(), saved(), Path("there")) == []


def test_a_word_allows_what_it_names_alone() -> None:
    run = tiny_run(seed=5, split="98,2,0", allow_change=("SEED",))
    with pytest.raises(UsageError, match=r"SPLIT 99,1,0 → 98,2,0 \(.*\)\. .*ALLOW_CHANGE=SEED,SPLIT;"):
        check(run, saved(), Path("there"))
    notes = check(tiny_run(seed=5, split="98,2,0", allow_change=("SEED", "SPLIT")), saved(), Path("there"))
    assert [note.startswith("changed since the checkpoint, as allowed: S") for note in notes] == [True, True]


def test_weights_alone_ask_for_the_model_alone() -> None:
    run = tiny_run(seed=5, name="sgd", dtype="bf16", split="98,2,0", seq_length=16)
    assert check(run, saved(), Path("there"), position=False, optimizer=False) == []
    with pytest.raises(UsageError, match="ALLOW_CHANGE=ROTARY_BASE"):
        check(tiny_run(rotary_base=10_000), saved(), Path("there"), position=False, optimizer=False)
    with pytest.raises(UsageError, match="HIDDEN_SIZE"):
        check(tiny_run(hidden_size=128), saved(), Path("there"), position=False, optimizer=False)


def test_another_optimizer_begins_anew_where_its_state_is_not_taken() -> None:
    notes = check(tiny_run(name="sgd"), saved(), Path("there"), optimizer=False)
    assert notes[0].startswith("warning: changed since the checkpoint: OPTIMIZER adam → sgd")


def test_fields_that_another_version_lacks_are_no_change() -> None:
    there = saved(rotary_base=10_000)
    del there["model"]["rotary_base"], there["logging"]
    there["model"]["of_old"] = 1
    assert check(tiny_run(), there, Path("there")) == []


def test_names_are_checked() -> None:
    assert not unknown_names(ALLOWABLE)
    assert unknown_names(("sedd",)).endswith("did you mean SEED?")
    assert "it takes BLEND_BY" in unknown_names(("*",))
    assert unknown_names(("SEED", "LR")) == "a change of LR needs no word"
    assert unknown_names(("NUM_LAYERS",)) == "a change of NUM_LAYERS is refused"
