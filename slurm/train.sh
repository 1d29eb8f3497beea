#!/usr/bin/env bash
#SBATCH --job-name=recurrent-bart
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-gpu=8
#SBATCH --mem-per-gpu=60G
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# Train on the nodes of a SLURM job, one process per GPU: `sbatch slurm/train.sh [flags of launch/train.py]`.
#
# sbatch flags override the settings above: `sbatch --nodes=4 --gpus-per-node=4 --partition=a100 slurm/train.sh`.
# Five minutes before the time limit, all processes save a checkpoint and stop, and the job is requeued. It then resumes
# from the checkpoint. The run folder is runs/slurm-JOB, or --output_dir.
#
# In an array (`sbatch --array=1-5 slurm/train.sh`), each task has a separate run folder and takes its number as seed.
# A flag @FILE is replaced by the flags in the line of FILE that has the task number; quotes work as in a shell.
set -euo pipefail

: "${SLURM_JOB_ID:?is not set; start this script with sbatch slurm/train.sh}"
cd "$SLURM_SUBMIT_DIR"
[[ -f slurm/job.sh ]] || { echo "error: slurm/job.sh not found: run sbatch in the root of the repository" >&2; exit 2; }
# shellcheck source=slurm/job.sh
source slurm/job.sh

mistake() {
    echo "error: $*" >&2
    exit 2
}

# Print the flags in line NUMBER of FILE, one per line. The file may have Windows line ends, a byte order mark and
# quotes.
flags_in_line() {
    python - "$@" <<'END'
import shlex, sys
name, number = sys.argv[1], int(sys.argv[2])
try:
    lines = open(name, encoding="utf-8-sig").read().split("\n")
    words = shlex.split(lines[number - 1]) if number <= len(lines) else []
except OSError as error:
    sys.exit(f"error: @{name}: cannot be read ({error.strerror})")
except ValueError as error:
    sys.exit(f"error: @{name}: line {number} cannot be read ({error})")
if not words:
    sys.exit(f"error: @{name}: line {number} is missing or empty")
# The final mark preserves an empty last flag.
print(*words, "end", sep="\n")
END
}

# Collect the flags; replace @FILE by a line of FILE.
index=${SLURM_ARRAY_TASK_ID:-}
given=()
# A resumed run keeps its seed.
[[ -z $index || " $*" == *" @"* || " $*" == *" --resume"* ]] || given=(--seed "$index")
for flag; do
    if [[ $flag == @* ]]; then
        [[ -n $index ]] || mistake "$flag: needs an array job: sbatch --array=1-5 slurm/train.sh $flag"
        lines=$(flags_in_line "${flag#@}" "$index") || exit 2
        mapfile -t words <<<"$lines"
        given+=("${words[@]::${#words[@]}-1}")
    else
        given+=("$flag")
    fi
done

# Find the run folder; the last flag that names it wins.
folder=runs/slurm-$job
verb=--output_dir
flags=()
for ((i = 0; i < ${#given[@]}; i++)); do
    case ${given[i]} in
        --output[_-]dir=* | --resume=*) verb=${given[i]%%=*} folder=${given[i]#*=}${index:+/$index} ;;
        --output[_-]dir | --resume) verb=${given[i]} folder=${given[++i]:?a folder is missing}${index:+/$index} ;;
        *) flags+=("${given[i]}") ;;
    esac
done
# The run began before this job was requeued.
if ((${SLURM_RESTART_COUNT:-0})) && [[ -e $folder/config.json ]]; then
    verb=--resume
fi
keep_caches_in "$folder/caches"
# An old outcome must not be taken for the result of this job. The file stays in case the run cannot begin.
began=$folder/caches/began-$SLURM_JOB_ID
touch "$began"
outcome() { [[ ! $folder/outcome.json -nt $began ]] || cat "$folder/outcome.json"; }

# srun forwards the signal to all processes. srun may have ended already: `kill` must not end this script then.
is_asked=0
srun_id=$folder/caches/srun-$SLURM_JOB_ID
trap 'is_asked=1; [[ ! -s $srun_id ]] || kill -USR1 "$(<"$srun_id")" 2>/dev/null || true' USR1
# SLURM sends SIGTERM to the job and its processes when it ends the job itself; SLURM then decides about a requeue. The
# script must wait for srun: a remaining srun would end the processes of the requeued job.
is_ended=0
trap 'is_ended=1' TERM

# Bash loses the exit code of a process that ends while a signal interrupts `wait`. A subshell, which no signal ends,
# therefore writes the code to a file.
srun_code=$folder/caches/code-$SLURM_JOB_ID
rm -f "$srun_id" "$srun_code"
(
    trap : USR1 TERM
    code=0
    # shellcheck disable=SC2016
    bash -c 'echo $$ > "$0"; exec "$@"' "$srun_id" "${everywhere[@]}" \
        bash slurm/process.sh launch/train.py "${flags[@]}" "$verb" "$folder" || code=$?
    echo "$code" > "$srun_code"
) &
processes=$!
while kill -0 "$processes" 2>/dev/null; do wait "$processes" || true; done
code=$(cat "$srun_code" 2>/dev/null || echo 1)
rm -f "$srun_id" "$srun_code"

# srun returns the worst exit code, which may come from a process that srun killed. The run's outcome.json is exact.
said=$(outcome | sed -n 's/.*"code": \([0-9]*\).*/\1/p')
code=${said:-$code}

every_node_answers() {
    timeout 60 srun --overlap --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 true
}

goes_on() {
    ((!is_ended)) || return 1
    case $code in
        0 | 2) return 1 ;;
        # A user who creates a stop file does not want a requeue.
        75) ! outcome | grep -q '"reason": "the stop file"' ;;
        *) ((is_asked)) || ! every_node_answers ;;
    esac
}

# Note the newest checkpoint at each requeue. Return 1 once it was the same at four requeues in a row.
advances() {
    local newest before n_same=0 note=$folder/caches/requeued-at
    newest=$(find "$folder/checkpoints" -maxdepth 1 -name 'step-*' 2>/dev/null | sort | tail -n 1)
    read -r before n_same <<<"$(cat "$note" 2>/dev/null || true)" || true
    [[ $before == "${newest##*/}." ]] && ((n_same += 1)) || n_same=0
    echo "${newest##*/}. $n_same" > "$note"
    ((n_same < 3))
}

if goes_on; then
    if advances; then
        echo "job $job is requeued; the run continues in $folder"
        # Requeue last: SLURM ends everything that the job still runs.
        scontrol requeue "$job"
    else
        echo "error: job $job was requeued three times without a new checkpoint, and is not requeued again: allow more" \
            "--time, or lower --eval_documents or --save_every"
    fi
fi
exit "$code"
