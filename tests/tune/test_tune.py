"""`megatron-rocm tune` from its words to its file, with a stand-in for hipblaslt-bench and for the GPU's kernels.

See standin/: the benchmark and the process that judges are real ones, which read and write what the real ones do.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import in_nursery

from megatron_rocm.cli import main
from megatron_rocm.config import read
from megatron_rocm.platform import machine
from megatron_rocm.platform.machine import GIB, Gpu, Machine
from megatron_rocm.resolve import resolve
from megatron_rocm.tune import bench, trial
from megatron_rocm.tune.shapes import Gemm
from megatron_rocm.tune.tuned import Product, Tuned, load

STANDIN = Path(__file__).parent / "standin"
FAST_NAN, TWICE_ROUNDED, RIGHT, CRASHES = "201", "202", "203", "205"  # standin/kernels.py


def gpus(vendor: str, arch: str, tier: str = "te") -> Machine:
    gpu = Gpu(192 * GIB, f"{vendor} {arch}")
    return Machine(gpu.name, vendor, arch, (gpu,) * 8, 2**40, 64, tier)  # type: ignore[arg-type]


MI300X, MI250X, H100 = gpus("amd", "gfx942"), gpus("amd", "gfx90a", "torch"), gpus("nvidia", "sm_90")
START = trial._start
WHOLE_405B = ("MODEL_SIZE=405", "TP=8", "PP=8", "NNODES=8", "SEQ_LENGTH=8192")


@pytest.fixture
def standin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with hipblaslt-bench on PATH, and a library for the stamp; MI300X for this machine, with Apex.

    The worker is forked from one that has imported torch.
    """
    program = tmp_path / "bin" / bench.PROGRAM
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable} -IS\nimport sys\nsys.path.insert(0, {str(STANDIN)!r})\n"
                       "from hipblaslt_bench import main\nsys.exit(main(sys.argv[1:]))\n")  # fmt: skip
    program.chmod(0o755)
    library = tmp_path / "libhipblaslt.so.1.2"
    library.write_bytes(b"kernels")
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    monkeypatch.setenv("PYTHONPATH", str(STANDIN))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("STANDIN_LIBRARY", str(library))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trial, "_start", forked)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name.startswith("fused_weight") or find_spec(name))
    be(MI300X, monkeypatch)
    return tmp_path


def forked(words: list[str], environment: dict[str, str], output: Path, timeout: float) -> int:
    assert words[:3] == [sys.executable, "-m", "megatron_rocm.tune.worker"]
    return in_nursery([str(STANDIN / "gpu.py"), *words[3:]], environment, output.parent, output, timeout)


def be(here: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "find", lambda target="", environment=None: here)


def products(tuned: Tuned) -> dict[str, Product]:
    return {name: product for product in tuned.products for name in product.names}


def rows(folder: Path) -> dict[tuple[str, ...], str]:
    """(transA, transB, m, n, k, types of A and D) → kernel, of the file that hipBLASLt reads."""
    lines = [line.strip().split(",") for line in (folder / "hipblaslt.txt").read_text().splitlines()[1:]]
    values = [cells for cells in lines if cells[0] != "transA"]
    return {
        tuple(cells[at] for at in (0, 1, 4, 5, 6, 17, 20)): cells[34 if len(cells) == 37 else 36] for cells in values
    }


@pytest.mark.parametrize(
    ("words", "form", "shape"),
    (
        (("MODEL_SIZE=8", "TP=1", "SEQ_LENGTH=8192"), "new", ("T", "N", "28672", "8192", "4096", "bf16_r", "bf16_r")),
        (WHOLE_405B, "old", ("T", "N", "13312", "8192", "16384", "bf16_r", "bf16_r")),
    ),
    ids=("8B", "405B"),
)
def test_wrong_kernels_are_refused_and_the_fastest_right_one_is_kept(
    words: tuple[str, ...], form: str, shape: tuple[str, ...], standin: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("STANDIN_FORMAT", form)
    assert main(["tune", *words, "--out", "tuned"]) == 0
    printed = capsys.readouterr().out
    tuned = load(standin / "tuned" / "tuned.json")
    found = products(tuned)
    assert len(found) == 15 and tuned.by == "hipblaslt"
    for name, product in found.items():
        if name == "head wgrad":
            assert product.kernel is None and "Apex" in product.why
            continue
        assert product.kernel and (product.kernel.kernel, product.kernel.us) == (RIGHT, 70.5), (name, product)
        assert product.default_us == 100.0
        refused = {one.kernel: one.why for one in product.refused}
        assert "1 NaN and 0 Inf in the result (scaled inputs)" in refused[FAST_NAN]
        assert "elements are wrong" in refused[TWICE_ROUNDED] or "more than once" in refused[TWICE_ROUNDED]
    chosen = rows(standin / "tuned")
    assert len(chosen) == len(tuned.products) - 1 and set(chosen.values()) == {RIGHT} and shape in chosen
    assert (standin / "tuned" / "hipblaslt.txt").read_text().startswith("Git Version: c4b2dc9869\n")
    assert tuned.stamp["GPU architecture"] == "gfx942" and tuned.stamp["hipBLASLt"].startswith("libhipblaslt.so.1.2 ")
    assert "100.0 → 70.5 µs; 2 refused" in printed and "GEMM_TUNING=tuned/tuned.json" in printed
    train = ["train", "--family", "llama3", *words, "GEMM_TUNING=tuned/tuned.json", "DRY_RUN=1"]
    assert main(train) == 0
    assert str(standin / "tuned" / "hipblaslt.txt") in capsys.readouterr().out
    (standin / "libhipblaslt.so.1.2").write_bytes(b"other kernels")
    assert main(train) == 2
    assert "does not fit: hipBLASLt was libhipblaslt.so.1.2 " in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(
    standin: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("megatron_rocm.tune.command._tune", lambda *_: pytest.fail("it went on"))
    (standin / "file").touch()
    for out in ("--out=file", "OUT=file/folder"):
        assert main(["tune", "MODEL_SIZE=8", "TP=1", out]) == 2
        assert re.search(r"--out file\S*: can't write in \S*file:", capsys.readouterr().err)


def test_an_empty_folder_name_is_none(standin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    def tune(resolution: object, out: Path, most: int) -> int:
        found.append(str(out))
        return 0

    monkeypatch.setattr("megatron_rocm.tune.command._tune", tune)
    assert main(["tune", "MODEL_SIZE=8", "TP=1", "OUT="]) == 0
    assert found == ["gemm_tuning/llama3_8_tp1_cp1_mbs1_seq2048_gfx942"]


def test_a_benchmark_ends_with_its_tune(tmp_path: Path) -> None:
    """However that ends: kill -9."""
    program = tmp_path / bench.PROGRAM
    program.write_text("#!/bin/sh\necho $$ > pid\nexec sleep 60\n")
    program.chmod(0o755)
    words = "from megatron_rocm.tune.bench import Bench\nfrom pathlib import Path\nimport os\n"
    tune = subprocess.Popen([sys.executable, "-c", f"{words}Bench({str(program)!r}, Path(), os.environ)"], cwd=tmp_path)
    assert eventually(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    tune.kill()
    tune.wait()
    pid = (tmp_path / "pid").read_text().strip()
    assert eventually(lambda: not running(pid))


def eventually(true: Callable[[], object], seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_where_nothing_is_right_nothing_is_written(
    standin: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One candidate each, which is wrong, so that nothing is left; and a benchmark that fails for one product."""
    monkeypatch.setenv("STANDIN_FAILS", "28672")
    assert main(["tune", "MODEL_SIZE=8", "TP=1", "--candidates", "1"]) == 0
    printed = capsys.readouterr().out
    assert "fc1 forward                  left to the library: not tuned: " in printed and "exit status 134" in printed
    assert printed.count("left to the library: no faster kernel is right; 1 refused") == 13
    assert "no file was written" in printed and not (standin / "gemm_tuning").exists()


def test_a_file_that_the_library_does_not_apply_is_not_written(
    standin: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its kernels would seem right: what was judged is the library's own choice."""
    monkeypatch.setenv("STANDIN_DEAF", "1")
    assert main(["tune", "MODEL_SIZE=8", "TP=1"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("left to the library: hipBLASLt takes kernel 100 all the same") == 14
    assert "no file was written" in printed


def test_a_benchmark_of_another_library_is_refused(
    standin: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STANDIN_REVISION", "0123456789")
    assert main(["tune", "MODEL_SIZE=8", "TP=1"]) == 2
    said = capsys.readouterr().err
    assert "is of hipBLASLt c4b2dc9869, but training loads 0123456789" in said and bench.PROGRAM in said


def test_a_kernel_that_kills_its_process_is_refused(standin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Started as the program starts it."""
    monkeypatch.setattr(trial, "_start", START)
    resolution = resolve(read("llama3", ["MODEL_SIZE=8", "TP=1"], {}, ()), MI300X, {}, dry_run=True)
    one = Gemm("fc1", "forward", 512, 512, 512, "TN", "bf16", "bf16", accumulates=False, count=1)
    other = Gemm("fc2", "forward", 512, 512, 1024, "TN", "bf16", "bf16", accumulates=False, count=1)
    tuner = bench.Bench(str(standin / "bin" / bench.PROGRAM), standin, {})
    kernel = tuner.candidates(one)[0]
    tuner._details[one.key][CRASHES] = {}
    tuner.write(standin, {one.key: type(kernel)(CRASHES, 1.0)}, 8)
    file = standin / "tuned.json"
    Tuned("hipblaslt", "", "", {}, "", ()).save(file)
    answer = trial.Trials(resolution, standin)("judge", [other, one], tuning=str(file))
    assert answer.rulings[other.key].right
    assert answer.rulings[one.key] == trial.Ruling(False, "its process was killed by SIGSEGV")
    assert answer.library == str(standin / "libhipblaslt.so.1.2") and answer.revision == tuner.revision


def test_without_the_benchmark_torch_tunes_what_it_multiplies(
    standin: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (standin / "bin" / bench.PROGRAM).unlink()
    be(MI250X, monkeypatch)
    monkeypatch.setenv("STANDIN_TUNED", f"Gemm_Hipblaslt_{RIGHT}")
    assert main(["tune", "MODEL_SIZE=8", "TP=1", "--out", "tuned"]) == 0
    tuned = load("tuned/tuned.json")
    assert tuned.by == "tunableop" and {product.kernel.kernel for product in tuned.products if product.kernel} == {
        f"Gemm_Hipblaslt_{RIGHT}"
    }
    files = [(standin / "tuned" / f"tunableop{number}.csv").read_text() for number in range(8)]
    assert len(set(files)) == 1 and files[0].startswith("Validator,PT_VERSION,")
    assert f"GemmTunableOp_BFloat16_TN,tn_6144_2048_4096_ld_4096_4096_6144,Gemm_Hipblaslt_{RIGHT}," in files[0]
    assert sum(line.startswith("Gemm") for line in files[0].splitlines()) == 15


def test_a_wrong_kernel_of_torchs_is_refused_too(
    standin: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With Transformer Engine torch multiplies for the output layer alone."""
    (standin / "bin" / bench.PROGRAM).unlink()
    monkeypatch.setenv("STANDIN_TUNED", f"Gemm_Hipblaslt_{FAST_NAN}")
    assert main(["tune", "MODEL_SIZE=8", "TP=1", "--out", "tuned"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("refused: kernel Gemm_Hipblaslt_201 for head ") == 2
    assert printed.count("Transformer Engine asks hipBLASLt itself, past TunableOp") == 12
    assert "no file was written" in printed and not Path("tuned").exists()


def test_on_nvidia_nothing_applies(
    standin: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A build for CUDA lists one kernel, Default."""
    be(H100, monkeypatch)
    monkeypatch.setenv("STANDIN_TUNED", "Default")
    assert main(["tune", "MODEL_SIZE=8", "TP=1"]) == 0
    printed = capsys.readouterr().out
    assert "nothing to tune: torch " in printed and "cuBLASLt's own choice" in printed
    assert not Path("gemm_tuning").exists()


def test_on_a_cpu_nothing_applies(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "TARGET=cpu", "MODEL_SIZE=tiny"]) == 0
    assert "nothing to tune: on a CPU" in capsys.readouterr().out


def test_a_plan_lists_the_products(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "TARGET=mi300x", "DRY_RUN=1", *WHOLE_405B]) == 0
    printed = capsys.readouterr().out
    assert "Llama 3.1 405B: 15 matrix products on each GPU" in printed
    assert "  fc1   forward    13312    8192   16384  TN  bf16 → bf16 " in printed
    assert "  fc1   wgrad      16384   13312    8192  NT  bf16 → +fp32" in printed


@pytest.mark.parametrize(
    ("words", "said"),
    (
        (["TARGET=mi300x", "MODEL_SIZE=8"], "TARGET=mi300x: kernels are timed on the GPU itself"),
        (["--candidates", "0"], "--candidates 0"),
        (["--nonsense"], "tune: "),
        (["HIPBLASLT_TUNING_OVERRIDE_FILE=x.txt"], "HIPBLASLT_TUNING_OVERRIDE_FILE is set"),
    ),
)
def test_mistakes(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", *words]) == 2
    assert said in capsys.readouterr().err


def test_help_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--help"]) == 0
    assert "--candidates N" in capsys.readouterr().out


def test_logs_of_hipblaslt_name_the_kernels_that_ran() -> None:
    """A line as hipBLASLt's documentation shows it."""
    line = (
        "hipblaslt-bench --api_method c -m 1024 -n 512 -k 768 --lda 1024 --ldb 1024 --ldc 1024 --ldd 1024  "
        "--stride_a 0 --stride_b 0 --stride_c 0 --stride_d 0  --alpha 1.000000 --beta 1.000000 --transA N --transB T "
        "--batch_count 1  --a_type f16_r --b_type f16_r --c_type f16_r --d_type f16_r --scale_type f32_r "
        "--bias_type f32_r   --compute_type f32_r --algo_method index --solution_index 56073"
    )
    one = Gemm("fc1", "wgrad", 1024, 512, 768, "NT", "fp16", "fp16", accumulates=False, count=1)
    assert bench.used(f"other\n{line}\n{line.replace('56073', '7')}") == {bench.problem(one): {"56073", "7"}}


def test_saved_files_load_again(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"by": "tunableop", "title": "t", "made": "m", "stamp": {"a": "b"}, "library": "l"}
    tuned = Tuned(**fields, products=(Product("k", ("a", "b"), 3, why="w"),), files={"f": "d"})
    tuned.save(tmp_path / "tuned.json")
    assert load(tmp_path / "tuned.json") == tuned
    assert json.loads((tmp_path / "tuned.json").read_text())["by"] == "tunableop"
