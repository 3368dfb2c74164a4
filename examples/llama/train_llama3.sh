#!/usr/bin/env bash
# Train Llama 3, 3.1 or 3.2 with megatron-core, on AMD, NVIDIA or a CPU.
#
#   bash examples/llama/train_llama3.sh                                    # what this machine can train, mock data
#   MODEL_SIZE=8 MBS=2 BS=128 SEQ_LENGTH=8192 TP=1 bash …                  # one node of eight GPUs
#   MODEL_SIZE=405 NNODES=16 NODE_RANK=$i MASTER_ADDR=$head bash …         # one call per node
#
# Every variable with its default: bash examples/llama/train_llama3.sh --help
# What a run would be, without starting it: DRY_RUN=1
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec "$here/../../tools/megatron-rocm" train --family llama3 "$@"
