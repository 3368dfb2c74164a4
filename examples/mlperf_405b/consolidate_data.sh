#!/usr/bin/env bash
# Merge C4's 1,024 training files into 8 and its validation files into one, and cut out the validation samples.
#
#   C4_PATH=/data/c4/en MERGED_C4_PATH=/data/c4/merged bash examples/mlperf_405b/consolidate_data.sh
#   … consolidate_data.sh --shard 0/3                            # a third of the files, on one of three machines
#   sbatch --array=0-9 examples/mlperf_405b/consolidate_data.sh  # each job its share
#
# preprocess.sh can do without it. Every variable with its default: --help
#SBATCH --job-name=consolidate_c4
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --time=04:00:00
#SBATCH --output=slurm-%x-%A_%a.out
set -euo pipefail

# sbatch runs a copy of this file from its spool, so the checkout is looked for where it was submitted too.
for root in "$(dirname "${BASH_SOURCE[0]}")/../.." "${SLURM_SUBMIT_DIR:-.}" "${SLURM_SUBMIT_DIR:-.}/../.."; do
  [[ ! -x $root/tools/megatron-rocm ]] || exec "$root/tools/megatron-rocm" data c4 consolidate "$@"
done
echo "consolidate_data.sh: tools/megatron-rocm is not found: submit from the checkout's top folder" >&2
exit 2
