#!/usr/bin/env bash
#SBATCH --job-name=recurrent-bart-evaluate
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-gpu=8
#SBATCH --mem-per-gpu=60G
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# Compute ROUGE and loss of a model on all GPUs: `sbatch slurm/evaluate.sh --model RUN/model`, with the flags of
# launch/evaluate.py. The results are in the job's output, and in the file of --json if it is given.
set -euo pipefail

: "${SLURM_JOB_ID:?is not set; start this script with sbatch slurm/evaluate.sh}"
cd "$SLURM_SUBMIT_DIR"
[[ -f slurm/job.sh ]] || { echo "error: slurm/job.sh not found: run sbatch in the root of the repository" >&2; exit 2; }
# shellcheck source=slurm/job.sh
source slurm/job.sh

keep_caches_in "runs/caches/$job"
"${everywhere[@]}" bash slurm/process.sh launch/evaluate.py "$@"
