#!/usr/bin/env bash
# One run under SLURM: a Ray node on each machine of the allocation, the run on all of them, and nothing left after it.
#
#   sbatch launch/slurm.sh my.yaml train.tokens=10B
#
# Run it from a folder that all machines share. What is preempted is queued again, and resumes from its last checkpoint.

# ---- fill in ----
#SBATCH --job-name=sparsetrain
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
# ---- the rest stays ----
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --output=%x-%j.log
set -euo pipefail

if (($# == 0)); then
  echo "usage: sbatch launch/slurm.sh CONFIG [KEY=VALUE ...]" >&2
  exit 2
fi
VENV=${VENV:-$PWD/.venv}                  # made by `make setup`, on the shared filesystem
PORT=$((20000 + SLURM_JOB_ID % 10000))    # other jobs' Rays may run on the same machines
GPUS=${SLURM_GPUS_ON_NODE:-0}
PER_NODE=$((GPUS > 0 ? GPUS : SLURM_CPUS_PER_TASK))
if ((GPUS > 0)); then GPUS_PER_WORKER=1; else GPUS_PER_WORKER=0; fi

export PATH=$VENV/bin:$PATH RAY_USAGE_STATS_ENABLED=0
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n') # of this job alone
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}                         # and NCCL_IB_HCA etc. as the site recommends

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
read -r -a addresses < <(srun --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" hostname --ip-address)
address=${addresses[0]}:$PORT

srun ray symmetric-run --address "$address" --min-nodes "$SLURM_JOB_NUM_NODES" --disable-usage-stats \
  --num-cpus "$SLURM_CPUS_PER_TASK" --num-gpus "$GPUS" -- \
  sparsetrain train "$@" --resume --address "$address" \
  "cluster.workers=$((SLURM_JOB_NUM_NODES * PER_NODE))" \
  "cluster.cpus_per_worker=$((SLURM_CPUS_PER_TASK / PER_NODE))" "cluster.gpus_per_worker=$GPUS_PER_WORKER"
