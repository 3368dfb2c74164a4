#!/usr/bin/env bash
# Turn JSON Lines into the .bin and .idx that pretrain_llm.py trains on, with the flags of the NeMo pretraining guide.
#
#   bash examples/pretrain_llm/preprocess_data.sh --ht-tokenizer models/Llama-3.1-8B \
#     --data-prefix zh_classicalwiki-20261101-pages-articles-multistream --input-dir raw --output-dir data
#
# reads raw/<data-prefix>.jsonl (or .json, also .gz or .zst, or .parquet) and writes
# data/preprocessed/<data-prefix>_text_document.bin, .idx and .json.
# More flags, such as --workers or --on-error, go to tools/preprocess_data.py: see its --help.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export GLIBC_TUNABLES="${GLIBC_TUNABLES-glibc.malloc.hugetlb=1}" # memory in huge pages: a tenth less CPU time
exec "$here/../../tools/megatron-rocm" data preprocess-nemo "$@"
