#!/usr/bin/env bash
# Train Llama on the nodes of a Slurm job, one task a node.
#
#   sbatch -N 4 examples/llama/train_llama_slurm.sh MODEL_SIZE MBS BATCH_SIZE_PER_NODE SEQ_LENGTH TOTAL_ITERS \
#       FSDP RECOMPUTE RECOMPUTE_NUM_LAYERS [KEY=VALUE …]
#
# What is left off at the end keeps its default. MODEL_NAME=llama2|llama3 chooses the script (llama3), every other
# KEY=VALUE goes to it; BS is the number of nodes times BATCH_SIZE_PER_NODE. Partition and account are sbatch's own
# options: sbatch -p … -A …, and --gres=gpu:8 where a cluster wants GPUs asked for by name. Each node finds the network
# interface that leads to the first one; NETWORK_INTERFACE=… names it. The checkout, with its .venv, lies on a file
# system that all nodes share.
#SBATCH --job-name=llama
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=01:00:00
#SBATCH --output=slurm-%x-%j.out
set -euo pipefail

refuse() {
  echo "train_llama_slurm.sh: $*" >&2
  exit 2
}

names=(MODEL_SIZE MBS BATCH_SIZE_PER_NODE SEQ_LENGTH TOTAL_ITERS FSDP RECOMPUTE RECOMPUTE_NUM_LAYERS)
positional=()
pairs=()
given=()
model_name=${MODEL_NAME:-llama3}
dry_run=${DRY_RUN:-0}
master_addr=
master_port=${MASTER_PORT:-29475}
for argument in "$@"; do
  case $argument in
  MODEL_NAME=*) model_name=${argument#*=} ;;
  MASTER_ADDR=*) master_addr=${argument#*=} ;;
  MASTER_PORT=*) master_port=${argument#*=} ;;
  NNODES=* | NODE_RANK=*) refuse "${argument%%=*} comes from the job: leave it out, and set the nodes with sbatch -N" ;;
  DRY_RUN=*) dry_run=${argument#*=} ;;
  IMAGE=*) IMAGE=${argument#*=} ;;
  *=*) pairs+=("$argument") ;;
  *) positional+=("$argument") ;;
  esac
done

[[ $model_name == llama2 || $model_name == llama3 ]] || refuse "MODEL_NAME=$model_name: it is llama2 or llama3"
[[ -z ${IMAGE:-} ]] || refuse "IMAGE=$IMAGE: containers are not supported in this version: unset IMAGE"
((${#positional[@]} <= ${#names[@]})) || refuse "${#positional[@]} positional arguments, at most ${#names[@]}: ${names[*]}"
[[ -n ${SLURM_JOB_ID:-} ]] || refuse "this is not a Slurm job: sbatch -N 2 $0 $*"
command -v scontrol >/dev/null || refuse "scontrol is not on PATH: it names the job's nodes"

for i in "${!positional[@]}"; do
  name=${names[i]} value=${positional[i]}
  if [[ $name == BATCH_SIZE_PER_NODE ]]; then
    [[ $value =~ ^[1-9][0-9]{0,8}$ ]] || refuse "BATCH_SIZE_PER_NODE=$value (argument $((i + 1))): it is a whole number from 1"
    name=BS value=$((SLURM_JOB_NUM_NODES * value))
  fi
  for pair in ${pairs[@]+"${pairs[@]}"}; do
    [[ $pair != "$name="* ]] || refuse "$name is given twice: as argument $((i + 1)) and as $pair"
  done
  given+=("$name=$value")
done

# sbatch runs a copy of this file from its spool, so the scripts beside it are looked for where it was submitted too.
submitted=$(scontrol show job "$SLURM_JOB_ID" 2>/dev/null | sed -n 's/^ *Command=\(.*train_llama_slurm\.sh\).*/\1/p')
train=
for folder in "$(dirname "${BASH_SOURCE[0]}")" "$(dirname "${submitted:-.}")" \
  "${SLURM_SUBMIT_DIR:-.}/examples/llama" "${SLURM_SUBMIT_DIR:-.}"; do
  if [[ -f $folder/train_$model_name.sh ]]; then
    train=$(cd "$folder" && pwd)/train_$model_name.sh
    break
  fi
done
[[ -n $train ]] || refuse "train_$model_name.sh is not found: submit from the checkout's top folder"

if [[ -z $master_addr ]]; then
  nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST") || refuse "scontrol can't expand the node list $SLURM_JOB_NODELIST"
  master_addr=${nodes%%$'\n'*}
fi

run=(bash "$train" ${given[@]+"${given[@]}"} ${pairs[@]+"${pairs[@]}"}
  "NNODES=$SLURM_JOB_NUM_NODES" "MASTER_ADDR=$master_addr" "MASTER_PORT=$master_port")

# A mistake is told once here, not once a node.
check=("${run[@]}" NODE_RANK=0 DRY_RUN=1)
[[ $dry_run == 0 ]] || exec "${check[@]}"
"${check[@]}" >/dev/null

# --cpu-bind=none: torchrun's processes share the node's cores among themselves.
# shellcheck disable=SC2016  # SLURM_NODEID is each node's own
exec srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 \
  bash -c 'exec "$@" "NODE_RANK=$SLURM_NODEID"' train "${run[@]}"
