"""GEMM_TUNING: what each value makes of a run's environment, and when a tuned file is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_rocm.cli import main
from megatron_rocm.config import read
from megatron_rocm.errors import UsageError
from megatron_rocm.platform.machine import GIB, Gpu, Machine, find
from megatron_rocm.platform.settings import LIBRARY_PREFIXES
from megatron_rocm.resolve import Resolution, resolve
from megatron_rocm.tune.shapes import gemms
from megatron_rocm.tune.tuned import Product, Tuned, digests
from megatron_rocm.tune.versions import changes, stamp, torch_build

WORDS = ("MODEL_SIZE=8", "TP=1", "GRADIENT_ACCUMULATION_FUSION=0")  # here, where Apex is not installed
NAMES = (
    "TE_HIPBLASLT_TUNING_RUN_COUNT", "TE_HIPBLASLT_TUNING_ALGO_COUNT", "HIPBLASLT_TUNING_OVERRIDE_FILE",
    "PYTORCH_TUNABLEOP_ENABLED", "PYTORCH_TUNABLEOP_TUNING", "PYTORCH_TUNABLEOP_FILENAME",
)  # fmt: skip


def gpus(vendor: str, arch: str, tier: str) -> Machine:
    gpu = Gpu(192 * GIB, f"{vendor} {arch}")
    return Machine(gpu.name, vendor, arch, (gpu,) * 8, 2**40, 64, tier)  # type: ignore[arg-type]


MI300X, MI250X, H100 = gpus("amd", "gfx942", "te"), gpus("amd", "gfx90a", "torch"), gpus("nvidia", "sm_90", "te")


def resolved(here: Machine, *words: str, said: dict[str, str] | None = None) -> Resolution:
    request = read("llama3", (*WORDS, *words), {}, LIBRARY_PREFIXES)
    return resolve(request, here, said or {}, dry_run=True)


def tuned(folder: Path, here: Machine, by: str = "hipblaslt") -> Path:
    """A tuned file for WORDS on `here`, as `tune` writes it."""
    folder.mkdir(exist_ok=True)
    library = folder / "libhipblaslt.so"
    library.write_bytes(b"kernels")
    names = ["hipblaslt.txt"] if by == "hipblaslt" else [f"tunableop{number}.csv" for number in range(8)]
    for name in names:
        (folder / name).write_text("Git Version: 1\n")
    products = tuple(Product(gemm.key, (gemm.name,), gemm.count) for gemm in gemms(resolved(here).config))
    values = stamp(here, str(library))
    Tuned(by, "8B", "now", values, str(library), products, digests(folder, names)).save(folder / "tuned.json")  # type: ignore[arg-type]
    return folder / "tuned.json"


COUNTS = {"TE_HIPBLASLT_TUNING_RUN_COUNT": "10", "TE_HIPBLASLT_TUNING_ALGO_COUNT": "50"}


@pytest.mark.parametrize(
    ("here", "value", "expected"),
    (
        (MI300X, "0", {}),
        (MI300X, "1", COUNTS),
        (MI300X, "", COUNTS),
        (
            MI300X,
            "hipblaslt",
            {"TE_HIPBLASLT_TUNING_RUN_COUNT": "0", "HIPBLASLT_TUNING_OVERRIDE_FILE": "hipblaslt.txt"},
        ),
        (
            MI300X,
            "tunableop",
            {
                "PYTORCH_TUNABLEOP_ENABLED": "1",
                "PYTORCH_TUNABLEOP_TUNING": "0",
                "PYTORCH_TUNABLEOP_FILENAME": "tunableop%d.csv",
            },
        ),
        (MI250X, "0", {}),
        (MI250X, "1", {}),
        (MI250X, "hipblaslt", {"HIPBLASLT_TUNING_OVERRIDE_FILE": "hipblaslt.txt"}),
        (H100, "0", {}),
        (H100, "1", {}),
    ),
)
def test_each_value_has_its_environment(here: Machine, value: str, expected: dict[str, str], tmp_path: Path) -> None:
    said = str(tuned(tmp_path / "tuned", here, value)) if len(value) > 1 else value
    environment = resolved(here, f"GEMM_TUNING={said}").environment
    paths = {name: str(tmp_path / "tuned" / text) for name, text in expected.items() if "." in text}
    assert {name: environment[name][0] for name in NAMES if name in environment} == expected | paths


def test_a_deterministic_run_times_nothing_but_takes_a_file(tmp_path: Path) -> None:
    online = resolved(MI300X, "GEMM_TUNING=1", "DETERMINISTIC=1").environment
    assert not set(NAMES) & set(online)
    file = tuned(tmp_path / "tuned", MI300X)
    assert "HIPBLASLT_TUNING_OVERRIDE_FILE" in resolved(MI300X, f"GEMM_TUNING={file}", "DETERMINISTIC=1").environment


def test_a_file_is_none_for_fp8(tmp_path: Path) -> None:
    file = tuned(tmp_path / "tuned", MI300X)
    with pytest.raises(UsageError, match="GEMM_TUNING=1 or 0 for training in FP8"):
        resolved(MI300X, f"GEMM_TUNING={file}", "TE_FP8=1")
    assert resolved(MI300X, "GEMM_TUNING=1", "TE_FP8=1").environment["TE_HIPBLASLT_TUNING_RUN_COUNT"][0] == "10"


def edited(file: Path, **fields: Any) -> None:
    content = json.loads(file.read_text())
    for name, value in fields.items():
        content[name] = content[name] | value if isinstance(value, dict) else value
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "name", ("GPU architecture", "GPU", "partition", "driver", "torch", "HIP", "Transformer Engine")
)
def test_a_stale_stamp_is_refused_with_what_changed(name: str, tmp_path: Path) -> None:
    file = tuned(tmp_path / "tuned", MI300X)
    edited(file, stamp={name: "another"})
    with pytest.raises(
        UsageError, match=f"GEMM_TUNING={file} does not fit: {name} was another and is .*Tune again with"
    ):
        resolved(MI300X, f"GEMM_TUNING={file}")


def test_another_library_is_refused(tmp_path: Path) -> None:
    file = tuned(tmp_path / "tuned", MI300X)
    (tmp_path / "tuned" / "libhipblaslt.so").write_bytes(b"other kernels")
    with pytest.raises(UsageError, match=r"hipBLASLt was libhipblaslt.so \w{16} and is libhipblaslt.so \w{16}"):
        resolved(MI300X, f"GEMM_TUNING={file}")
    (tmp_path / "tuned" / "libhipblaslt.so").unlink()
    with pytest.raises(UsageError, match="and is libhipblaslt.so missing"):
        resolved(MI300X, f"GEMM_TUNING={file}")


def test_an_edited_file_is_refused(tmp_path: Path) -> None:
    """Its kernels are not those that were judged."""
    file = tuned(tmp_path / "tuned", MI300X, "tunableop")
    (tmp_path / "tuned" / "tunableop3.csv").write_text("Git Version: 2\n")
    with pytest.raises(UsageError, match=r"tunableop3.csv was tunableop3.csv \w+ and is tunableop3.csv \w+"):
        resolved(MI300X, f"GEMM_TUNING={file}")


def test_other_shapes_are_refused_by_name(tmp_path: Path) -> None:
    file = tuned(tmp_path / "tuned", MI300X)
    with pytest.raises(
        UsageError,
        match=r"the shapes changed: 15 of 15 are not in it \(qkv forward TN 6144x4096x4096 bf16>bf16, .* and 12",
    ):
        resolved(MI300X, f"GEMM_TUNING={file}", "MBS=2", "BS=64")
    resolved(MI300X, f"GEMM_TUNING={file}", "BS=64", "RECOMPUTE=1")  # does them more often


@pytest.mark.parametrize(
    ("content", "said"),
    ((None, "No such file"), ("{}", "not a file of `megatron-rocm tune`"), ("transA,transB", "not a file of")),
)
def test_what_is_no_tuned_file_is_refused(content: str | None, said: str, tmp_path: Path) -> None:
    file = tmp_path / "tuned.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UsageError, match=f"^GEMM_TUNING={file}: .*{said}.*0, 1"):
        resolved(MI300X, f"GEMM_TUNING={file}")


@pytest.mark.parametrize(
    ("name", "value"),
    (("stamp", None), ("stamp", "x"), ("stamp", {"GPU": 5}), ("files", ["hipblaslt.txt"]), ("library", 5),
     ("by", "cublas"), ("by", []), ("products", None), ("products", [{}])),
)  # fmt: skip
def test_a_field_of_another_type_is_refused(name: str, value: Any, tmp_path: Path) -> None:
    file = tuned(tmp_path / "tuned", MI300X)
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    with pytest.raises(UsageError, match="not a file of `megatron-rocm tune`"):
        resolved(MI300X, f"GEMM_TUNING={file}")


def test_each_gpu_of_the_run_must_have_its_file(tmp_path: Path) -> None:
    """One that was tuned where a single GPU was visible would leave the others to the library."""
    file = tuned(tmp_path / "tuned", MI300X, "tunableop")
    content = json.loads(file.read_text())
    del content["files"]["tunableop7.csv"]
    file.write_text(json.dumps(content))
    with pytest.raises(UsageError, match="tunableop7.csv was not made and is tunableop7.csv"):
        resolved(MI300X, f"GEMM_TUNING={file}")
    content["files"] = {}
    file.write_text(json.dumps(content | {"by": "hipblaslt"}))
    with pytest.raises(UsageError, match="hipblaslt.txt was not made and is hipblaslt.txt missing"):
        resolved(MI300X, f"GEMM_TUNING={file}")


@pytest.mark.parametrize(
    "name", ("HIPBLASLT_TUNING_OVERRIDE_FILE", "PYTORCH_TUNABLEOP_ENABLED", "TE_HIPBLASLT_ALGO_LOAD")
)
def test_two_choices_of_kernels_are_refused(name: str, tmp_path: Path) -> None:
    file = tuned(tmp_path / "tuned", MI300X)
    for words, said in (((f"{name}=1",), {}), ((), {name: "1"})):
        with pytest.raises(UsageError, match=f"with {name}=1: both choose kernels"):
            resolved(MI300X, f"GEMM_TUNING={file}", *words, said=said)
    resolved(MI300X, f"GEMM_TUNING={file}", said={name: "0"})


def test_a_plan_for_another_machine_knows_its_architecture_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tuned(tmp_path / "tuned", replace(MI300X, name="AMD Instinct MI300X"))
    edited(file, stamp={"torch": "another"})
    words = ["train", "--family", "llama3", *WORDS, f"GEMM_TUNING={file}", "DRY_RUN=1"]
    assert main([*words, "TARGET=mi300x"]) == 0
    file_read = tmp_path / "tuned" / "hipblaslt.txt"
    assert re.search(rf"HIPBLASLT_TUNING_OVERRIDE_FILE +{file_read} ", capsys.readouterr().out)
    assert main([*words, "TARGET=mi355x"]) == 2
    assert "GPU architecture was gfx942 and is gfx950" in capsys.readouterr().err
    assert main([*words, "TARGET=cpu", "MODEL_SIZE=tiny"]) == 2
    assert "GPU architecture was gfx942 and is cpu" in capsys.readouterr().err


def test_torchs_versions_are_read_without_importing_it() -> None:
    import torch

    found = torch_build()
    assert found["__version__"] == torch.__version__ and found.get("hip") == torch.version.hip


def test_the_drivers_version_is_in_the_stamp(tmp_path: Path) -> None:
    (tmp_path / "sys/module/amdgpu").mkdir(parents=True)
    (tmp_path / "sys/module/amdgpu/version").write_text("6.16.6\n")
    assert stamp(MI300X, "", tmp_path)["driver"] == "6.16.6"
    assert stamp(MI300X, "", tmp_path / "none")["driver"].startswith("of Linux ")


def test_changes_name_what_is_new_and_what_is_gone() -> None:
    assert changes({"a": "1", "b": "2"}, {"b": "3", "c": "4"}) == [
        "a was 1 and is none", "b was 2 and is 3", "c was none and is 4",
    ]  # fmt: skip


def test_this_machines_stamp_can_be_made() -> None:
    assert stamp(find(), "")["torch"] == torch_build()["__version__"]
