#!/usr/bin/env bash
# Common part of the batch scripts: rendezvous address and srun command. Sourced from the repository root.

# Name of the job: it stays the same after a requeue, and each task of an array has a different one.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}

# Use the environment that was active at submission, or else the one that `make` created.
[[ -n ${VIRTUAL_ENV:-}${CONDA_PREFIX:-} ]] || export PATH=$PWD/.venv/bin:$PATH

# Start one process per GPU, or one per node without GPUs.
n_per_node=${SLURM_GPUS_ON_NODE:-0}
((n_per_node)) || n_per_node=1
n_processes=$((n_per_node * SLURM_JOB_NUM_NODES))
n_cpus=$((SLURM_CPUS_ON_NODE / n_per_node))
((n_cpus)) || n_cpus=1
# srun would read this variable and reject it together with --cpus-per-task.
unset SLURM_CPUS_PER_GPU

# Rank 0 is on the first node. The port depends on the job and lies below the range of ephemeral ports.
hostnames=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
# Without `| head -n 1`: scontrol may still write when head ends, and the job would end with SIGPIPE.
export MASTER_ADDR=${hostnames%%$'\n'*} MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))

# By default, PyTorch starts as many threads in each process as the node has cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$n_cpus}
# WARN: NCCL prints only the reason of a failure. Users choose the network with NCCL_SOCKET_IFNAME, NCCL_IB_HCA and
# similar variables, which sbatch passes on to every process.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# --distribution=block: ranks are numbered node by node. --gpu-bind=none: each process sees all GPUs of its node, which
# NCCL needs for NVLink, and uses the GPU of its local rank. --kill-on-bad-exit: one failure ends all processes.
# shellcheck disable=SC2034  # used where this is sourced
everywhere=(
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$n_processes" --ntasks-per-node="$n_per_node"
    --cpus-per-task="$n_cpus" --distribution=block --gpu-bind=none --kill-on-bad-exit=1 --wait=60
)

# Put compiled extensions into a folder that all nodes share; it also replaces an unwritable home folder.
keep_caches_in() {
    mkdir -p "$1"
    JOB_CACHES=$(realpath "$1")
    export JOB_CACHES TORCH_EXTENSIONS_DIR=$JOB_CACHES/torch_extensions
    # Some clusters mount home read-only. Data sets, models and settings are cached there.
    [[ -w ${HOME:-} ]] || export HOME=$JOB_CACHES/home
    mkdir -p "$HOME"
}
