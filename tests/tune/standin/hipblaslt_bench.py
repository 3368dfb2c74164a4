"""Stands in for hipblaslt-bench: prints kernels and times for a product, and writes HIPBLASLT_TUNING_FILE, as it does.

What is printed follows ROCm/rocm-libraries projects/hipblaslt clients/common/include/argument_model.hpp and the example
in docs/how-to/how-to-use-hipblaslt-offline-tuning.rst. STANDIN_FORMAT=old is the way of the first versions: a file
without headings and always 37 columns (UserDrivenTuningParser.cpp in ROCm/hipBLASLt). `kernels.py` has the kernels.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from kernels import REVISION, TIMES, name_of  # beside this file

OLD = os.environ.get("STANDIN_FORMAT") == "old"
COLUMNS = (
    "transA,transB,grouped_gemm,batch_count,m,n,k,alpha,lda,stride_a,beta,ldb,stride_b,ldc,stride_c,ldd,stride_d,a_type,"
    "b_type,c_type,d_type,compute_type,scaleA,scaleB,scaleC,scaleD,amaxD,activation_type,bias_vector,bias_type,"
    "rotating_buffer"
) + ("" if OLD else ",flush,use_gpu_timer")


OPTIONS = ["algo_method", "requested_solution", "rotating", "flush", "use_gpu_timer", "print_kernel_info", "workspace"]
OPTIONS += [] if OLD else ["skip_slow_solution_ratio"]


def main(words: list[str]) -> int:
    if words == ["--help"]:
        print("hipblaslt-bench command line options", *(f"--{name} <value>" for name in OPTIONS), sep="\n")
        return 0
    if OLD and "--skip_slow_solution_ratio" in words:
        print("unknown option", file=sys.stderr)
        return 1
    said = {name: value for name, value in zip(words, words[1:], strict=False) if name.startswith("-")}
    if said.get("--transA") not in ("T", "N") or not {"--print_kernel_info", "--flush"} <= set(words):
        print("hipblaslt-bench stand-in: wrong options", file=sys.stderr)
        return 1
    if os.environ.get("STANDIN_FAILS") == said["-m"]:
        print("hipblasLtCreate failed", file=sys.stderr)
        return 134
    file = Path(os.environ["HIPBLASLT_TUNING_FILE"])
    if not file.exists():
        file.write_text(f"Git Version: {REVISION}\n")
        print("Initialize tuning file.")
    print("hipBLASLt version: 100202\n\nIs supported 6 / Total solutions: 6")
    values = problem(said)
    for number, (index, us) in enumerate(TIMES.items()):
        print(f"[{number}]:{COLUMNS},hipblaslt-Gflops,hipblaslt-GB/s,us\n    {values},66613.8,363.509,{us}")
        print(f"    --Solution index: {index}\n    --Solution name:  {name_of(index)}")
        print(f"    --kernel name:    {name_of(index)}_k")
    best = min(TIMES, key=lambda index: TIMES[index])
    row = f"{values},66613.8,363.509,{TIMES[best]},{best}"
    heading = "soulution_index" if OLD else "solution_index,kernel_name"
    print(f"Winner: \n[0]:{COLUMNS},hipblaslt-Gflops,hipblaslt-GB/s,us,{heading}\n    {row}")
    with open(file, "a") as out:
        if OLD:
            out.write(f"    {row},gfx942,304\n")
        else:
            out.write(f"    {COLUMNS},hipblaslt-Gflops,hipblaslt-GB/s,us,{heading},gcnArchName,CUs\n")
            out.write(f"    {row},{name_of(best)}_k,gfx942:sramecc+:xnack-,304\n")
    return 0


def problem(said: dict[str, str]) -> str:
    """The values under COLUMNS."""
    m, n, k = (int(said[name]) for name in ("-m", "-n", "-k"))
    values = [
        said["--transA"], said["--transB"], 0, 1, m, n, k, said["--alpha"], said["--lda"], m * k, said["--beta"],
        said["--ldb"], n * k, said["--ldc"], m * n, said["--ldd"], m * n, said["--a_type"], said["--b_type"],
        said["--c_type"], said["--d_type"], said["--compute_type"], 0, 0, 0, 0, 0, "none", 0, "f32_r",
        said["--rotating"], *(() if OLD else (1, 1)),
    ]  # fmt: skip
    return ",".join(map(str, values))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
