#!/usr/bin/env bash
# One process of a job, started by srun: what SLURM says of its place, in PyTorch's words.
set -euo pipefail

export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS

# nodes would be in each other's way
export TRITON_CACHE_DIR=$JOB_CACHES/triton-$SLURM_NODEID
# the node's own place is faster, where there is one
[[ -w ${TMPDIR:-/tmp} ]] || export TMPDIR=$JOB_CACHES/tmp
mkdir -p "$TRITON_CACHE_DIR" "${TMPDIR:-/tmp}"

# exec: a signal meets no shell on its way
exec python -u "$@"
