# Sourced by the scripts in slurm/ on the first node of a job, with CONFIG set: trains until the run is done, and puts
# the job back into the queue when it is preempted or about to run out of time. README tells of the variables.
#
# shellcheck shell=bash disable=SC2153,SC2154  # CONFIG, RUN and the others come from outside

cd "$SLURM_SUBMIT_DIR" || exit 78
RUN="${RUN:-runs/$(basename "$CONFIG" .yaml)}"
nodes="$SLURM_JOB_NUM_NODES"
hosts="$SLURM_JOB_NODELIST"

arguments=(--config "$CONFIG" "run.dir=$(dirname "$RUN")" "run.name=$(basename "$RUN")")
if [ -n "${DATA:-}" ]; then
    arguments+=("data.train=$DATA/train.parquet" "data.val=$DATA/val.parquet")
fi
read -r -a extra <<<"${EXTRA:-}"
arguments+=("${overrides[@]}" "${extra[@]}")

mkdir -p "$RUN"
folders="$PWD:$PWD" # that a container has to see
for folder in "$RUN" ${DATA:+"$DATA"}; do
    folders+=",$(realpath "$folder"):$(realpath "$folder")"
done
pyxis=()
inside=()
case "${CONTAINER:-}" in
    "") PYTHON="${PYTHON:-.venv/bin/python}" ;;
    *.sif) inside=(apptainer exec --nv --bind "$folders" --pwd "$PWD" "$CONTAINER") ;;
    *) pyxis=("--container-image=$CONTAINER" "--container-mounts=$folders" "--container-workdir=$PWD") ;;
esac
PYTHON="${PYTHON:-python}"
if [ -z "${CONTAINER:-}" ] && [ ! -x "$PYTHON" ]; then
    echo "launch: no $PYTHON in $PWD: install there first (README), or set PYTHON or CONTAINER" >&2
    exit 78
fi

say() { echo "launch: $(date +%T) $*" >&2; }
attempt() { sed -n 's/.*"attempt": \([0-9]*\).*/\1/p' "$RUN/attempt.json" 2>/dev/null; }
ended_by() { sed -n 's/.*"end": "\([^"]*\)".*/\1/p' "$RUN/attempt.json" 2>/dev/null; }

# What squeue says of the job in a format, or nothing if the controller does not answer for two minutes.
job_is() {
    local tries
    for tries in 1 2 3 4 5 6; do
        squeue --noheader --jobs "$SLURM_JOB_ID" --format "$1" 2>/dev/null && return
        sleep $((5 * tries))
    done
}

# Wait until a process has ended, however often a signal interrupts that. Sets code.
await() {
    local again
    while :; do
        wait "$1"
        code=$?
        kill -0 "$1" 2>/dev/null || break
    done
    if [ "$code" -gt 128 ]; then # it may have ended just as the signal came
        wait "$1" 2>/dev/null
        again=$?
        [ "$again" -eq 127 ] || code=$again
    fi
}

# Run `python -m launch node` on all nodes, with more options. Sets code.
everywhere() {
    # --overlap: a step that a dead node never reported the end of holds on to its share otherwise.
    srun --overlap --export=ALL --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 \
        --cpus-per-task="${SLURM_CPUS_ON_NODE:-1}" --cpu-bind=none --wait=60 "${pyxis[@]}" "${inside[@]}" \
        "$PYTHON" -m launch node --nodes "$nodes" --head "$(scontrol show hostnames "$hosts" | head -n 1)" \
        --logs "$RUN/logs" ${RANKS:+--ranks "$RANKS"} "$@" -- "${arguments[@]}" &
    step=$!
    await "$step"
    step=
}

# Leave if the job has been cancelled, or if it was asked to stop and has its work saved.
leave_if_asked() {
    [ "$code" -eq 75 ] || [ -n "$asked" ] || [ "$(job_is %T)" != RUNNING ] || return 0
    case "$(ended_by)" in
        "stopped by file"*)
            say "stopped by the file; submit again to go on"
            exit 75
            ;;
    esac
    if [ "$(job_is %T)" = RUNNING ]; then
        say "saved; back into the queue"
        scontrol requeue "$SLURM_JOB_ID"
    else
        say "cancelled, or taken away by Slurm: it is not for this script to go on"
    fi
    exit 75
}

# After a crash: the nodes that the job still has, which --no-kill makes fewer.
count_nodes() {
    hosts="$(job_is %N)"
    nodes="$(job_is %D)"
    if [ "$nodes" -lt "${MIN_NODES:-1}" ]; then
        say "$nodes nodes are left, fewer than MIN_NODES=$MIN_NODES: back into the queue"
        scontrol requeue "$SLURM_JOB_ID"
        exit 75
    fi
}

asked=
step=
trap 'asked=1; [ -z "$step" ] || kill -USR1 "$step" 2>/dev/null' USR1 TERM
job="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"

if [ "${DOCTOR:-1}" != 0 ]; then
    everywhere --job "$job.doctor" --probe
    if [ "$code" -eq 78 ]; then
        say "not started: mend what is unfit, leave it out with sbatch --exclude, or set DOCTOR=0"
        exit 78
    fi
    leave_if_asked
fi

start=0
fruitless=0
while :; do
    id="$job.$start"
    before="$(attempt)"
    say "start $id of $RUN on $hosts"
    everywhere --job "$id"
    case "$code" in
        0)
            say "done"
            exit 0
            ;;
        78)
            say "not started again: the message above names what to mend"
            exit 78
            ;;
    esac
    leave_if_asked

    find "$RUN/logs/$id" -name 'failed-*' 2>/dev/null | sort | head -n 1 | xargs -r cat >&2
    if [ "$(attempt)" = "$before" ]; then
        fruitless=$((fruitless + 1))
        if [ "$fruitless" -eq 3 ]; then
            say "3 starts in a row ended before training began: giving up"
            exit 1
        fi
    else
        fruitless=0
    fi
    count_nodes
    start=$((start + 1))
done
