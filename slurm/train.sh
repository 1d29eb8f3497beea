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
# What stands above is changed at submission: `sbatch --nodes=4 --gpus-per-node=4 --partition=a100 slurm/train.sh`.
# Five minutes before the job's time is over all processes stop with a checkpoint, and the job goes back into the queue,
# to go on from it. The run folder is runs/slurm-JOB, or --output_dir.
#
# In an array (`sbatch --array=1-5 slurm/train.sh`) each task has a folder of its own, and its number for a seed. With
# @FILE among the flags, the line of FILE with its number is put there instead, with quotes as a shell has them.
set -euo pipefail

: "${SLURM_JOB_ID:?is not there: start with sbatch slurm/train.sh}"
cd "$SLURM_SUBMIT_DIR"
[[ -f slurm/job.sh ]] || { echo "error: submit it where slurm/job.sh is found" >&2; exit 2; }
# shellcheck source=slurm/job.sh
source slurm/job.sh

mistake() {
    echo "error: $*" >&2
    exit 2
}

# The flags in line NUMBER of FILE, one a line. The file may have Windows line ends, a byte order mark and quotes.
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
    sys.exit(f"error: @{name}: there is no line {number}, or it is empty")
# the mark behind them keeps an empty last one
print(*words, "end", sep="\n")
END
}

# each flag, the line of a file for one that is @FILE
index=${SLURM_ARRAY_TASK_ID:-}
given=()
# a run that is resumed keeps its own seed
[[ -z $index || " $*" == *" @"* || " $*" == *" --resume"* ]] || given=(--seed "$index")
for flag; do
    if [[ $flag == @* ]]; then
        [[ -n $index ]] || mistake "$flag: which line, only an array says: sbatch --array=1-5 slurm/train.sh $flag"
        lines=$(flags_in_line "${flag#@}" "$index") || exit 2
        mapfile -t words <<<"$lines"
        given+=("${words[@]::${#words[@]}-1}")
    else
        given+=("$flag")
    fi
done

# where the run is, which is the last word on it among the flags
folder=runs/slurm-$job
verb=--output_dir
flags=()
for ((i = 0; i < ${#given[@]}; i++)); do
    case ${given[i]} in
        --output[_-]dir=* | --resume=*) verb=${given[i]%%=*} folder=${given[i]#*=}${index:+/$index} ;;
        --output[_-]dir | --resume) verb=${given[i]} folder=${given[++i]:?is no folder}${index:+/$index} ;;
        *) flags+=("${given[i]}") ;;
    esac
done
# begun before this job was put back into the queue
if ((${SLURM_RESTART_COUNT:-0})) && [[ -e $folder/config.json ]]; then
    verb=--resume
fi
keep_caches_in "$folder/caches"
# how the run ended before says nothing about this time, but stays if the run cannot begin
began=$folder/caches/began-$SLURM_JOB_ID
touch "$began"
outcome() { [[ ! $folder/outcome.json -nt $began ]] || cat "$folder/outcome.json"; }

# srun hands the signal on to all processes
is_asked=0
processes=
trap 'is_asked=1; [[ -z $processes ]] || kill -USR1 "$processes"' USR1
# sent with SIGTERM to the processes where SLURM itself ends the job, and knows whether it comes back. Not to stay until
# srun is gone would leave one behind that ends the processes of the job that came back
is_ended=0
trap 'is_ended=1' TERM

"${everywhere[@]}" bash slurm/process.sh launch/train.py "${flags[@]}" "$verb" "$folder" &
processes=$!
# a signal ends the waiting, not the processes
while
    code=0
    wait "$processes" || code=$?
    kill -0 "$processes" 2>/dev/null
do :; done

# srun gives the code of the process that ended worst, which may be one that it ended itself; the run knows better
said=$(outcome | sed -n 's/.*"code": \([0-9]*\).*/\1/p')
code=${said:-$code}

every_node_answers() {
    timeout 60 srun --overlap --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 true
}

goes_on() {
    ((!is_ended)) || return 1
    case $code in
        0 | 2) return 1 ;;
        # whoever made a stop file does not want it to come back
        75) ! outcome | grep -q '"reason": "the stop file"' ;;
        *) ((is_asked)) || ! every_node_answers ;;
    esac
}

if goes_on; then
    echo "job $job goes back into the queue; the run goes on in $folder"
    # the last thing that is done: SLURM ends what the job still runs
    scontrol requeue "$job"
fi
exit "$code"
