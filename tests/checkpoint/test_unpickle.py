import argparse
import enum
import io
import os
import pickle
import random
import signal
import sys
import types

import numpy
import pytest
import torch
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter, load, save
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_rocm.checkpoint import reader
from megatron_rocm.checkpoint.unpickle import Inert, read_common, read_metadata, read_saved
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


def test_members_of_enumerations_as_debians_python_writes_them(tmp_path):
    """Python 3.11.0 to 3.11.3 pickle them as calls of getattr, which reaches nothing else here."""

    def written(of, name):
        member = Malicious(getattr, of, name)
        (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata({"a": member}, storage_data={})))
        torch.save({"iteration": 1, "signal": member}, tmp_path / "common.pt")

    written(signal.Signals, "SIGUSR1")
    assert read_common(tmp_path)["signal"] is signal.SIGUSR1
    encoding = _MEM_FORMAT_ENCODING
    written(encoding, "TORCH_PRESERVE_FORMAT")
    assert read_metadata(tmp_path).state_dict_metadata["a"] is encoding.TORCH_PRESERVE_FORMAT
    for of, name in ((Metadata, "__init__"), (encoding, "__class__"), (encoding, "mro")):
        written(of, name)
        with pytest.raises(UsageError, match="builtins.getattr"):
            read_metadata(tmp_path)
    written(signal.Signals, "__class__")
    with pytest.raises(UsageError, match="getattr"):
        read_common(tmp_path)


def test_a_dotted_name_does_not_reach_through_an_allowed_module(tmp_path):
    (tmp_path / ".metadata").write_bytes(b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93\x8c\x04true\x85R.")
    with pytest.raises(UsageError, match=r"torch\.os\.system"):
        read_metadata(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps({"a": 1}), pickle.dumps(Metadata({}))[:40]])
def test_damage_is_said_in_one_message(tmp_path, content):
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(UsageError, match=r"\.metadata: not the metadata"):
        read_metadata(tmp_path)


def saved(content):
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return file


def test_reads_what_a_run_saves():
    state = {"random": random.getstate(), "numpy": numpy.random.get_state(), "torch": torch.get_rng_state(), "x": None}
    read = read_saved(saved(state), "rng_state")
    assert read["random"] == state["random"] and torch.equal(read["torch"], state["torch"])
    assert read["numpy"][0] == "MT19937" and (read["numpy"][1] == state["numpy"][1]).all()


def test_reads_arguments_and_stands_in_for_classes_that_are_not_asked_for(monkeypatch):
    class Kind(enum.Enum):
        FLASH = 1

    module = types.ModuleType("megatron.training.kinds")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    module.Kind, Kind.__module__, Kind.__qualname__ = Kind, module.__name__, "Kind"
    arguments = argparse.Namespace(kind=Kind.FLASH, signal=signal.SIGTERM, dtype=torch.bfloat16, lr=0.1)
    file = saved({"args": arguments})
    monkeypatch.delitem(sys.modules, module.__name__)
    read = read_saved(file, "common.pt")["args"]
    assert (read.signal, read.dtype, read.lr) == (signal.SIGTERM, torch.bfloat16, 0.1)
    assert isinstance(read.kind, Inert) and repr(read.kind) in ("Kind(1,)", "Kind('FLASH',)")


@pytest.mark.parametrize("call", [os.system, os.mkdir, eval, getattr])
def test_an_object_calls_nothing(tmp_path, call):
    """Neither in common.pt nor among a checkpoint's objects, which torch's own planner reads by a plain unpickler."""
    trap = tmp_path / "sprung"
    argument = {os.system: f"touch {trap}", os.mkdir: str(trap), eval: f"open({str(trap)!r}, 'w')"}.get(call, "")
    evil = {"iteration": 3, "x": Malicious(call, argument)}
    torch.save(evil, tmp_path / "common.pt")
    with pytest.raises(UsageError, match="common.pt: .*it names (posix|nt|builtins|__builtin__)"):
        read_common(tmp_path)
    save(
        {"a": torch.ones(2), "rng_state/shard_0_1": evil["x"]}, storage_writer=FileSystemWriter(tmp_path), no_dist=True
    )
    planner, target = reader._Planner(), {"a": torch.zeros(2), "rng_state/shard_0_1": io.BytesIO()}
    with pytest.raises(CheckpointException, match="rng_state/shard_0_1: .*it names"):
        load(target, storage_reader=FileSystemReader(tmp_path), planner=planner, no_dist=True)
    assert not trap.exists()


class Built(Malicious):
    """As Malicious, and then given a state."""

    def __init__(self, state, call, *arguments):
        super().__init__(call, *arguments)
        self.state = state

    def __reduce__(self):
        return self.call, self.arguments, self.state


def test_an_array_of_pointers_is_none():
    """Its type, which a pickle may alter, would tell numpy that bytes are objects."""
    reconstruct = numpy.zeros(0).__reduce__()[0]
    for dtype in (numpy.dtype("O"), Malicious(numpy.dtype, "O8", False, True)):
        state = 1, (1,), dtype, False, b"\x41" * 8
        with pytest.raises(UsageError, match="has an array of 'O8'"):
            read_saved(saved(Built(state, reconstruct, numpy.ndarray, (0,), b"b")))


def test_no_one_is_told_to_read_without_restriction():
    with pytest.raises(UsageError) as told:
        read_saved(saved(Built((1,), slice, 1)))
    assert "weights_only" not in str(told.value)


@pytest.mark.parametrize(
    ("index", "place", "said"),
    [
        ("a", _StorageInfo("../elsewhere/__0_0.distcp", 0, 8), "outside its folder"),
        ("a", _StorageInfo("__0_0.distcp", -1, 8), "begins at -1"),
        ("b", _StorageInfo("__0_0.distcp", 0, 8), "where a part of a lies"),
        ("a", 5, "no attribute"),
    ],
)
def test_metadata_that_makes_no_sense(tmp_path, index, place, said):
    whole, none = torch.Size([2]), torch.Size([0])
    entry = TensorStorageMetadata(TensorProperties(), whole, [ChunkStorageMetadata(none, whole)])
    content = Metadata({"a": entry}, storage_data={MetadataIndex(index, none): place})
    (tmp_path / ".metadata").write_bytes(pickle.dumps(content))
    with pytest.raises(UsageError, match=f"not the metadata of a checkpoint, or damaged: .*{said}"):
        read_metadata(tmp_path)


@pytest.mark.parametrize("change", [{"iteration": "3"}, {"run": 5}, {"run": {"model": 5}}, {"opt_param_scheduler": []}])
def test_common_state_that_makes_no_sense(tmp_path, change):
    good = {"iteration": 3, "run": {"model": {}}}
    torch.save(good, tmp_path / "common.pt")
    assert read_common(tmp_path) == good
    torch.save({**good, **change}, tmp_path / "common.pt")
    with pytest.raises(UsageError, match=r"common\.pt: .*damaged"):
        read_common(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no archive", pickle.dumps({"a": 1}), saved({"a": 1}).getvalue()[:200]])
def test_a_damaged_archive_is_said_in_one_message(tmp_path, content):
    (tmp_path / "common.pt").write_bytes(content)
    with pytest.raises(UsageError, match=r"common\.pt: not what torch\.save writes, or damaged"):
        read_common(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"\.metadata: can't be read"):
        read_metadata(tmp_path)
