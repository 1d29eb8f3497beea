#!/usr/bin/env bash
#SBATCH --job-name=recurrent-bart-preflight
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-gpu=8
#SBATCH --mem-per-gpu=60G
#SBATCH --time=00:05:00
#SBATCH --output=%x-%j.out
# Look at every node in two minutes, before it is given a run of days: `sbatch --nodes=16 slurm/preflight.sh`, with the
# flags of launch/preflight.py. Bad nodes are named, with what is wrong, and the job fails.
set -euo pipefail

: "${SLURM_JOB_ID:?is not there: start with sbatch slurm/preflight.sh}"
cd "$SLURM_SUBMIT_DIR"
[[ -f slurm/job.sh ]] || { echo "error: submit it where slurm/job.sh is found" >&2; exit 2; }
# shellcheck source=slurm/job.sh
source slurm/job.sh

mkdir -p runs
keep_caches_in "runs/caches/$job"
# an error of NCCL is told by the process that meets it, and does not end it
export TORCH_NCCL_BLOCKING_WAIT=1
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# a process that cannot begin is what the others are to tell of
"${everywhere[@]}" --kill-on-bad-exit=0 --wait=0 bash slurm/process.sh launch/preflight.py \
    --folder runs --gpus "$n_per_node" --per_node "$n_per_node" --hosts "${hosts[@]}" "$@"
