import os
import pickle

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, save
from torch.distributed.checkpoint.metadata import Metadata

from megatron_rocm.checkpoint.unpickle import read_metadata
from megatron_rocm.errors import UsageError


class Malicious:
    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


def test_reads_what_torch_writes(tmp_path):
    state = {"a": torch.ones(3, 2, dtype=torch.bfloat16), "b": torch.zeros(4), "c": {"some": "object"}}
    save(state, storage_writer=FileSystemWriter(tmp_path), no_dist=True)
    read, plain = read_metadata(tmp_path), FileSystemReader(tmp_path).read_metadata()
    assert read.state_dict_metadata == plain.state_dict_metadata
    assert read.storage_data == plain.storage_data


@pytest.mark.parametrize("call", [os.system, os.mkdir, eval, getattr])
def test_calls_nothing_that_is_not_allowed(tmp_path, call):
    trap = tmp_path / "sprung"
    argument = {os.system: f"touch {trap}", os.mkdir: str(trap), eval: f"open({str(trap)!r}, 'w')"}.get(call, "")
    evil = Metadata(state_dict_metadata={"a": Malicious(call, argument)})
    (tmp_path / ".metadata").write_bytes(pickle.dumps(evil))
    with pytest.raises(UsageError, match="names (posix|nt|builtins)"):
        read_metadata(tmp_path)
    assert not trap.exists()


def test_a_dotted_name_does_not_reach_through_an_allowed_module(tmp_path):
    (tmp_path / ".metadata").write_bytes(b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93\x8c\x04true\x85R.")
    with pytest.raises(UsageError, match=r"torch\.os\.system"):
        read_metadata(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps({"a": 1}), pickle.dumps(Metadata({}))[:40]])
def test_damage_is_said_in_one_message(tmp_path, content):
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(UsageError, match=r"\.metadata: not the metadata"):
        read_metadata(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"\.metadata: can't be read"):
        read_metadata(tmp_path)
