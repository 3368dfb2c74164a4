#!/usr/bin/env bash
# Turn text into the tokens that megatron-core trains on: DATA_DIR/data_text_document.bin and .idx.
#
#   TOKENIZER_MODEL=train:4096 bash examples/llama/prepare_dataset.sh                 # this machine's Python sources
#   TOKENIZER_MODEL=NousResearch/Meta-Llama-3-8B INPUT=~/texts DATA_DIR=/data/mine \
#     bash examples/llama/prepare_dataset.sh                                          # a folder, .txt or .jsonl file
#   TOKENIZER_MODEL=NousResearch/Meta-Llama-3-8B DATASET=fineweb MAX_MB=500 \
#     bash examples/llama/prepare_dataset.sh                                          # or bookcorpus, wiki, c4
#
# Every variable with its default: bash examples/llama/prepare_dataset.sh --help
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export GLIBC_TUNABLES="${GLIBC_TUNABLES-glibc.malloc.hugetlb=1}" # memory in huge pages: a tenth less CPU time
exec "$here/../../tools/megatron-rocm" prepare "$@"
