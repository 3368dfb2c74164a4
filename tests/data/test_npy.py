from __future__ import annotations

import contextlib
import io
import os
import pickle

import numpy as np
import pytest

from megatron_rocm.data.npy import rows
from megatron_rocm.errors import UsageError


def save(path, values):
    array = np.empty(len(values), object)
    array[:] = values
    np.save(path, array, allow_pickle=True)


GOOD = {"input_ids": [1, 2, 3, 4, 5], "loss_mask": [0, 0, 1, 1, 1], "seq_start_id": [0, 3]}


@pytest.mark.parametrize(
    "row",
    [
        GOOD,
        {**GOOD, "input_ids": np.array(GOOD["input_ids"], np.int64)},  # what pandas reads from Parquet
        {**GOOD, "input_ids": np.array(GOOD["input_ids"], ">i4"), "loss_mask": np.array(GOOD["loss_mask"], bool)},
        {**GOOD, "input_ids": [np.int64(one) for one in GOOD["input_ids"]], "loss_mask": [False] * 2 + [1.0] * 3},
        {**GOOD, "seq_start_id": np.array([0, 3], np.uint16), "more": "is passed over"},
    ],
)
def test_rows(tmp_path, row):
    # numpy.save of a list of dicts, as MLPerf's convert_dataset.py calls it.
    np.save(tmp_path / "a.npy", [row, GOOD], allow_pickle=True)
    for one in rows(tmp_path / "a.npy"):
        assert one.ids.dtype == np.int64 and list(one.ids) == [1, 2, 3, 4, 5]
        assert list(one.mask) == [False, False, True, True, True] and list(one.starts) == [0, 3]


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("core", ["core", "_core"])
def test_every_numpys_and_pickles_way(tmp_path, protocol, core):
    row = {**GOOD, "input_ids": np.array(GOOD["input_ids"])}
    array = np.empty(1, object)
    array[0] = row
    raw = pickle.dumps(array, protocol=protocol)
    for old in (b"numpy._core.", b"numpy.core."):
        if protocol == 3:  # names stand there as they are; later protocols write their lengths
            raw = raw.replace(old, b"numpy." + core.encode() + b".")
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": (1,)})
    (tmp_path / "a.npy").write_bytes(file.getvalue() + raw)
    assert list(next(rows(tmp_path / "a.npy")).ids) == [1, 2, 3, 4, 5]


class Evil:
    def __init__(self, function, *arguments):
        self.reduced = (function, arguments)

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize(
    ("evil", "name"),
    [
        (Evil(os.system, "touch pwned"), "posix.system"),
        (Evil(eval, "open('pwned', 'w')"), "builtins.eval"),
        (Evil(np.fromfile, "pwned"), "numpy.fromfile"),
        (Evil(getattr, "", "join"), "builtins.getattr"),
        (Evil(np.save, "pwned.npy", [1]), "numpy.save"),
    ],
)
@pytest.mark.parametrize("place", ["row", "field", "inside"])
def test_nothing_is_run(tmp_path, monkeypatch, evil, name, place):
    monkeypatch.chdir(tmp_path)
    save("a.npy", [{"row": evil, "field": {**GOOD, "input_ids": evil}, "inside": {**GOOD, "input_ids": [evil]}}[place]])
    with pytest.raises(UsageError, match="a.npy: not a .npy file of packed sequences, or damaged: it names ") as error:
        list(rows("a.npy"))
    assert name in str(error.value) and os.listdir() == ["a.npy"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ([1, 2], "row 1: it is a list, not a dict"),
        ({**GOOD, "input_ids": "12345"}, "row 1: `input_ids` is not a list of numbers"),
        ({**GOOD, "input_ids": [[1, 2, 3, 4, 5]]}, "`input_ids` is not a list"),
        ({**GOOD, "input_ids": [1, 2, 3, 4, 5.5]}, "not whole numbers"),
        ({**GOOD, "input_ids": [1, 2, 3, 4, 2**70]}, "`input_ids` is not a list of numbers"),
        ({**GOOD, "input_ids": [1]}, "1 input_ids and 5 in loss_mask"),
        ({**GOOD, "loss_mask": [0, 1, 2, 0, 1]}, "other values than 0 and 1"),
        ({**GOOD, "seq_start_id": [0, 5]}, "seq_start_id does not begin with 0"),
        ({**GOOD, "seq_start_id": [1, 3]}, "seq_start_id does not begin with 0"),
        ({**GOOD, "seq_start_id": [0, 3, 3]}, "seq_start_id does not begin with 0"),
        ({**GOOD, "seq_start_id": []}, "seq_start_id|not a list of numbers"),
        ({"input_ids": [1], "loss_mask": [1]}, "row 1: it has no `seq_start_id`"),
        ({**GOOD, "input_ids": np.array(["a"])}, "an array of it is of 'U1', not of plain numbers"),
        ({**GOOD, "input_ids": np.zeros((5, 1))}, "shape .5, 1., one dimension was expected"),
        ({**GOOD, "input_ids": np.zeros(5, [("a", int)])}, "not of plain numbers"),
    ],
)
def test_other_content(tmp_path, row, words):
    save(tmp_path / "a.npy", [GOOD, row])
    with pytest.raises(UsageError, match=words):
        list(rows(tmp_path / "a.npy"))


def test_damaged_files(tmp_path):
    path = tmp_path / "a.npy"
    save(path, [GOOD] * 50)
    raw = path.read_bytes()
    for content in (b"", b"x", raw[:20], raw[:200], raw[:-1], b"PK" + raw):
        path.write_bytes(content)
        with pytest.raises(UsageError, match="a.npy: not a .npy file of packed sequences, or damaged"):
            list(rows(path))
    np.save(path, np.arange(10))
    with pytest.raises(UsageError, match="it holds an array of int64 of shape .10,., not a row of dicts"):
        list(rows(path))
    with pytest.raises(UsageError, match="^--input=/no/such.npy: can't be read: No such file"):
        list(rows("/no/such.npy"))


def test_every_cut_and_flip_is_an_error_or_good(tmp_path):
    """No damage gets through as an exception of another kind."""
    path = tmp_path / "a.npy"
    save(path, [{**GOOD, "input_ids": np.arange(5)}])
    raw = path.read_bytes()
    for at in range(100, len(raw), 3):
        for content in (raw[:at], raw[:at] + bytes([raw[at] ^ 0x21]) + raw[at + 1 :]):
            path.write_bytes(content)
            with contextlib.suppress(UsageError):
                list(rows(path))
