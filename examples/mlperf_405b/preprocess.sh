#!/usr/bin/env bash
# Turn C4 into the tokens that the Llama 3.1 405B benchmark reads: PREPROCESSED_PATH/c4-train.en_6_text_document.bin, …
#
#   export TOKENIZER_PATH=/data/mixtral-8x22b MERGED_C4_PATH=/data/c4/merged PREPROCESSED_PATH=/data/c4/tokens
#   bash examples/mlperf_405b/preprocess.sh                     # all of it on this machine
#   sbatch -N 9 examples/mlperf_405b/preprocess.sh              # one of the nine data sets a node
#   sbatch -N 1 --array=0-8 examples/mlperf_405b/preprocess.sh  # the same as a job array
#   MERGED_C4_PATH= C4_PATH=/data/c4/en bash …                  # from C4's own files, without merging them first
#
# With CONT_IMAGE_URL it runs in that container: Slurm's (pyxis), else docker's or podman's. The image needs Python and
# what the package depends on. Every variable with its default: --help
#SBATCH --job-name=preprocess_c4
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=04:00:00
#SBATCH --output=slurm-%x-%j.out
set -euo pipefail

refuse() {
  echo "preprocess.sh: $*" >&2
  exit 2
}

# sbatch runs a copy of this file from its spool, so the checkout is looked for where it was submitted too.
root=
for folder in "$(dirname "${BASH_SOURCE[0]}")/../.." "${SLURM_SUBMIT_DIR:-.}" "${SLURM_SUBMIT_DIR:-.}/../.."; do
  if [[ -x $folder/tools/megatron-rocm ]]; then
    root=$(cd "$folder" && pwd)
    break
  fi
done
[[ -n $root ]] || refuse "tools/megatron-rocm is not found: submit from the checkout's top folder"

# What is said as an argument may name a folder that the container needs.
for argument in "$@"; do
  case $argument in
  TOKENIZER_PATH=* | C4_PATH=* | MERGED_C4_PATH=* | PREPROCESSED_PATH=*) export "${argument?}" ;;
  -h | --help) exec "$root/tools/megatron-rocm" data c4 preprocess --help ;;
  esac
done

command=("$root/tools/megatron-rocm" data c4 preprocess "$@")
mounts=("$root")
given=()
if [[ -n ${CONT_IMAGE_URL:-} ]]; then
  [[ -z ${PREPROCESSED_PATH:-} ]] || mkdir -p "$PREPROCESSED_PATH"
  for name in TOKENIZER_PATH C4_PATH MERGED_C4_PATH PREPROCESSED_PATH; do
    [[ -n ${!name:-} ]] || continue
    [[ -d ${!name} ]] || refuse "$name=${!name}: there is no such folder, and a container needs one to mount"
    # The same path inside as outside: what is written beside the data names the tokenizer by it.
    path=$(cd "${!name}" && pwd)
    mounts+=("$path")
    given+=("$name=$path")
  done
  for name in N_VALIDATION_SAMPLES SHARDS APPEND_EOD WORKERS; do
    [[ -z ${!name:-} ]] || given+=("$name=${!name}")
  done
fi

if [[ -n ${SLURM_JOB_ID:-} ]]; then
  launch=(srun --ntasks-per-node=1 --cpu-bind=none)
  if [[ -n ${CONT_IMAGE_URL:-} ]]; then
    pairs=()
    for path in "${mounts[@]}"; do pairs+=("$path:$path"); done
    launch+=("--container-image=$CONT_IMAGE_URL" "--container-mounts=$(
      IFS=,
      echo "${pairs[*]}"
    )" --no-container-entrypoint)
  fi
  exec "${launch[@]}" "${command[@]}" ${given[@]+"${given[@]}"}
fi
[[ -n ${CONT_IMAGE_URL:-} ]] || exec "${command[@]}"

engine=$(command -v docker || command -v podman) || refuse "CONT_IMAGE_URL=$CONT_IMAGE_URL: neither docker nor podman is on PATH"
volumes=()
for path in "${mounts[@]}"; do volumes+=(--volume "$path:$path"); done
exec "$engine" run --rm --entrypoint "" "${volumes[@]}" "$CONT_IMAGE_URL" "${command[@]}" ${given[@]+"${given[@]}"}
