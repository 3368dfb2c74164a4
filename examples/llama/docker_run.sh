#!/usr/bin/env bash
# Run a command in the image for this machine: AMD or NVIDIA GPUs or a CPU, Docker or podman.
#
#   bash examples/llama/docker_run.sh train_llama3.sh MODEL_SIZE=8 TP=1 MBS=2 BS=128
#
# Without a command it is a shell. Images, folders and variables: bash examples/llama/docker_run.sh --help
# What would be run, without starting it: DRY_RUN=1
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec python3 "$here/../../tools/docker_run.py" "$@"
