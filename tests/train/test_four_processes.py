"""Layouts of four processes: context parallelism with the others, and pipeline stages of unequal layers."""

from __future__ import annotations

import numpy
import pytest
from support import metrics, tiny_run, train_all

from megatron_rocm.config.schema import RunConfig
from megatron_rocm.data.indexed import IndexedWriter

CONTEXT = {"tp": 2, "sequence_parallel": True, "cp": 2}
STAGES = {"pp": 2, "vpp": 2, "cp": 2}
# Six layers, the embedding and the loss are eight: 1, 2, 2 and 1 layers per chunk or stage.
UNEVEN = {"num_layers": 6, "count_embedding_and_loss": True}
SELECTIVE = {"recompute": True, "recompute_granularity": "selective", "recompute_modules": ("core_attn", "mlp")}
ALONE = {"plain": {}, "documents": {"reset_attention_mask": True}, "six layers": {"num_layers": 6}}
LAYOUTS = {
    "plain: cp 4": {"cp": 4},
    "plain: cp, tp, sequence parallel": CONTEXT,
    "plain: cp, tp, sequence parallel, recompute": {**CONTEXT, "recompute": True},
    "plain: cp, tp, sequence parallel, selective recompute": {**CONTEXT, **SELECTIVE},
    "plain: cp, vpp": STAGES,
    "plain: cp, vpp, recompute": {**STAGES, "recompute": True, "recompute_num_layers": 1},
    "documents: cp, tp, sequence parallel": {**CONTEXT, **ALONE["documents"]},
    "documents: cp, vpp, recompute": {**STAGES, **ALONE["documents"], "recompute": True},
    "six layers: pp 4": {**UNEVEN, "pp": 4},
    "six layers: pp, vpp, dp": {**UNEVEN, "pp": 2, "vpp": 2, "dp": 2, "distributed_optimizer": True},
    "six layers: pp, vpp, cp": {**UNEVEN, **STAGES},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunConfig]:
    """All of them, trained: those of one process in one start, those of four in another."""
    folder = tmp_path_factory.mktemp("four")
    random = numpy.random.RandomState(3)
    with IndexedWriter(folder / "data", 300) as writer:
        for _ in range(200):
            ids = 2 + (random.randint(298) + numpy.arange(random.randint(1, 31))) % 298
            ids[-1] = 1
            writer.add(ids, numpy.array([len(ids)]))
        writer.finalize()
    common = {"train_iters": 3, "blend": [(1.0, str(folder / "data"))], "split": "100,0,0"}
    made = {
        name: tiny_run(folder / name.replace(": ", "-"), **common, **fields)
        for name, fields in (ALONE | LAYOUTS).items()
    }
    train_all(*(made[name] for name in ALONE))
    train_all(*(made[name] for name in LAYOUTS))
    return made


@pytest.mark.slow
@pytest.mark.timeout(1100)
@pytest.mark.parametrize("name", LAYOUTS)
def test_as_one_process(runs: dict[str, RunConfig], name: str) -> None:
    found, wanted = ([row for row in metrics(runs[one]) if "lm_loss" in row] for one in (name, name.partition(":")[0]))
    assert len(found) == 3
    for row, one in zip(found, wanted, strict=True):
        assert abs(row["lm_loss"] - one["lm_loss"]) < 2e-6
        assert abs(row["grad_norm"] / one["grad_norm"] - 1) < 1e-5
