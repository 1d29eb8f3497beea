#!/usr/bin/env bash
#SBATCH --job-name=recurrent-bart-preflight
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-gpu=8
#SBATCH --mem-per-gpu=60G
#SBATCH --time=00:05:00
#SBATCH --output=%x-%j.out
# Test every node in two minutes, before a run of days: `sbatch --nodes=16 slurm/preflight.sh`, with the flags of
# launch/preflight.py. The job prints the bad nodes with the reasons, and fails.
set -euo pipefail

: "${SLURM_JOB_ID:?is not set; start this script with sbatch slurm/preflight.sh}"
cd "$SLURM_SUBMIT_DIR"
[[ -f slurm/job.sh ]] || { echo "error: slurm/job.sh not found: run sbatch in the root of the repository" >&2; exit 2; }
# shellcheck source=slurm/job.sh
source slurm/job.sh

mkdir -p runs
keep_caches_in "runs/caches/$job"
# The process that meets an NCCL error reports it and continues.
export TORCH_NCCL_BLOCKING_WAIT=1
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# --kill-on-bad-exit=0: if a process cannot start, the remaining processes report it.
"${everywhere[@]}" --kill-on-bad-exit=0 --wait=0 bash slurm/process.sh launch/preflight.py \
    --folder runs --gpus "$n_per_node" --per_node "$n_per_node" --hosts "${hosts[@]}" "$@"
