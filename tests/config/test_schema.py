"""A run's file."""

import json

import pytest
from support import tiny_run

from megatron_rocm.config.schema import RunConfig, digest


def test_a_file_of_a_version_with_fewer_fields_is_read(tmp_path):
    run = tiny_run()
    fields = run.model_dump(mode="json")
    del fields["training"]["rampup"]
    old = tmp_path / "run.json"
    old.write_text(json.dumps({"hash": digest(fields), **fields}))
    assert RunConfig.load(old) == run


def test_a_file_changed_by_hand_is_not(tmp_path):
    path = tmp_path / "run.json"
    tiny_run().save(path)
    path.write_text(path.read_text().replace('"seed": 1234', '"seed": 1'))
    with pytest.raises(ValueError, match="changed by hand"):
        RunConfig.load(path)


def test_the_hash_leaves_out_what_belongs_to_a_node():
    assert tiny_run().hash == tiny_run(node_rank=0, master_port=7000, threads=7, gpu_memory=1).hash
    assert tiny_run().hash != tiny_run(seed=1).hash
