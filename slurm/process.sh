#!/usr/bin/env bash
# Run one process of a job, started by srun: translate SLURM's rank variables into PyTorch's.
set -euo pipefail

export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS

# Nodes must not share a Triton cache.
export TRITON_CACHE_DIR=$JOB_CACHES/triton-$SLURM_NODEID
# Use the node's local folder for temporary files if it is writable, because it is faster.
[[ -w ${TMPDIR:-/tmp} ]] || export TMPDIR=$JOB_CACHES/tmp
mkdir -p "$TRITON_CACHE_DIR" "${TMPDIR:-/tmp}"

# exec replaces the shell, so that signals reach Python directly.
exec python -u "$@"
