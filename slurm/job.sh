#!/usr/bin/env bash
# What the batch scripts beside this one share: where processes meet and how they are started. Sourced from the root.

# the same after a requeue, and each task of an array has its own
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}

# an environment that was active when the job was submitted holds, else the one that `make` set up
[[ -n ${VIRTUAL_ENV:-}${CONDA_PREFIX:-} ]] || export PATH=$PWD/.venv/bin:$PATH

# one process per GPU, or per node where it has none
n_per_node=${SLURM_GPUS_ON_NODE:-0}
((n_per_node)) || n_per_node=1
n_processes=$((n_per_node * SLURM_JOB_NUM_NODES))
n_cpus=$((SLURM_CPUS_ON_NODE / n_per_node))
((n_cpus)) || n_cpus=1
# srun would take it from here, and refuses it beside --cpus-per-task
unset SLURM_CPUS_PER_GPU

# rank 0 is on the first node; the port is the job's own, below those that systems give away by themselves
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))

# PyTorch would start as many threads in each process as the node has cores
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$n_cpus}
# NCCL says why it fails, and no more. Which network it takes is the cluster's to say: NCCL_SOCKET_IFNAME, NCCL_IB_HCA
# and the like reach every process from where the job is submitted
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# block: ranks are counted node by node. Each process sees all GPUs of its node, or NCCL could not use NVLink, and takes
# that of its local rank. When one fails, the others end too
# shellcheck disable=SC2034  # used where this is sourced
everywhere=(
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$n_processes" --ntasks-per-node="$n_per_node"
    --cpus-per-task="$n_cpus" --distribution=block --gpu-bind=none --kill-on-bad-exit=1 --wait=60
)

# What programs build goes into this folder, which all nodes see, and so does what cannot be written elsewhere.
keep_caches_in() {
    mkdir -p "$1"
    JOB_CACHES=$(realpath "$1")
    export JOB_CACHES TORCH_EXTENSIONS_DIR=$JOB_CACHES/torch_extensions
    # on some clusters home is there to be read only; documents, models and settings are kept there
    [[ -w ${HOME:-} ]] || export HOME=$JOB_CACHES/home
    mkdir -p "$HOME"
}
