#!/usr/bin/env bash
# Train Llama 2 or Code Llama with megatron-core, on AMD, NVIDIA or a CPU.
#
#   bash examples/llama/train_llama2.sh                                    # what this machine can train, mock data
#   MODEL_SIZE=7 MBS=4 BS=256 TP=1 bash …                                  # one node of eight GPUs
#   MODEL_SIZE=70 NNODES=2 NODE_RANK=$i MASTER_ADDR=$head bash …           # one call per node
#
# Every variable with its default: bash examples/llama/train_llama2.sh --help
# What a run would be, without starting it: DRY_RUN=1
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec "$here/../../tools/megatron-rocm" train --family llama2 "$@"
