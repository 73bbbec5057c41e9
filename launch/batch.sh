# Sourced by the scripts in slurm/ on the first node of a job, with CONFIG set: trains until the run is done, and
# requeues the job when it is preempted or about to reach its time limit. README lists the variables. Where `program` is
# set, these arguments of distrain are run instead of a training of CONFIG.
#
# shellcheck shell=bash disable=SC2153,SC2154  # CONFIG, RUN and the others are set by the caller

cd "$SLURM_SUBMIT_DIR" || exit 78
RUN="${RUN:-runs/$(basename -- "$CONFIG" .yaml)}"
case "$RUN" in
    \~ | \~/*) RUN="$HOME${RUN#\~}" ;; # as in run.dir
    -*) RUN="./$RUN" ;;                  # not an option
esac
nodes="$SLURM_JOB_NUM_NODES"
hosts="$SLURM_JOB_NODELIST"

arguments=("${program[@]}")
if [ "${#program[@]}" -eq 0 ]; then
    arguments=("--config=$CONFIG" "run.dir='$(dirname "$RUN")'" "run.name=$(basename "$RUN")")
fi
if [ -n "${DATA:-}" ]; then
    arguments+=("data.train=$DATA/train.parquet" "data.val=$DATA/val.parquet")
fi
read -r -d '' -a extra <<<"${EXTRA:-}"
for setting in "${extra[@]}"; do
    case "$setting" in
        run.dir=* | run.name=*)
            echo "launch: EXTRA: $setting: set RUN, the folder of the run, instead" >&2
            exit 78
            ;;
    esac
done
arguments+=("${overrides[@]}" "${extra[@]}")

mkdir -p "$RUN"
folders="$PWD:$PWD" # mounted into a container
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
    echo "launch: $PYTHON not found in $PWD: install there first (README), or set PYTHON or CONTAINER" >&2
    exit 78
fi

info() { echo "launch: $(date +%T) $*" >&2; }

# Sleep for some seconds, but not after a signal.
rest() {
    [ -n "$asked" ] || sleep "$1" &
    wait $! # which a trap interrupts
}

# Set `field` to a field of the job in squeue's format, or to GONE if there is no such job any more. Waits for as long as
# the controller does not answer, which says nothing about the job; empty if a signal ends that.
job_field() {
    local pause=2
    until field="$(squeue --noheader --jobs "$SLURM_JOB_ID" --format "$1" 2>/dev/null)"; do
        case "$(squeue --noheader --jobs "$SLURM_JOB_ID" --format "$1" 2>&1 >/dev/null)" in
            *"Invalid job id"*) break ;;
        esac
        [ -z "$asked" ] || return
        [ "$pause" -gt 2 ] || info "the Slurm controller does not answer; waiting for it"
        rest "$pause"
        pause=$((pause < 30 ? 2 * pause : 60))
    done
    field="${field:-GONE}"
}

# Wait for a process to exit, even when signals interrupt the wait. Sets code.
await() {
    local again
    while :; do
        wait "$1"
        code=$?
        kill -0 "$1" 2>/dev/null || break
    done
    if [ "$code" -gt 128 ]; then # it may have exited just as the signal arrived
        wait "$1" 2>/dev/null
        again=$?
        [ "$again" -eq 127 ] || code=$again
    fi
}

# Run `python -m launch node` on all nodes, with these options added. Sets code.
run_nodes() {
    if [ -n "$asked" ]; then
        code=75
        return
    fi
    # --overlap: otherwise a step whose end a dead node never reported keeps its resources.
    srun --overlap --export=ALL --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 \
        --cpus-per-task="${SLURM_CPUS_ON_NODE:-1}" --cpu-bind=none --wait=60 "${pyxis[@]}" "${inside[@]}" \
        "$PYTHON" -m launch node --nodes "$nodes" --head "$(scontrol show hostnames "$hosts" | head -n 1)" \
        --logs "$RUN/logs" ${RANKS:+--ranks "$RANKS"} "$@" -- "${arguments[@]}" &
    step=$!
    [ -z "$asked" ] || kill -USR1 "$step" 2>/dev/null # it came before the step had a number
    await "$step"
    step=
}

# Ask the restart policy on this node, in the container if there is one. Signals are ignored, so that it answers.
policy() (
    trap '' USR1 TERM
    if [ "${#pyxis[@]}" -gt 0 ]; then
        inside=(srun --overlap --nodes=1 --ntasks=1 --nodelist="$SLURMD_NODENAME" "${pyxis[@]}")
    fi
    for _ in 1 2 3; do
        "${inside[@]}" "$PYTHON" -m launch.restart "$RUN" "$@" && return
        sleep 5
    done
)

# How to continue after the exit code in `code`. Sets decision, pause, without_progress and history.
decide() {
    local answer stop="$asked"
    case "$code" in
        0 | 75 | 78) ;;
        *)
            if [ -z "$stop" ]; then
                job_field %T
                [ "$field" = RUNNING ] || stop=1
            fi
            ;;
    esac
    answer="$(policy --code "$code" ${stop:+--stop-requested} --history "${history[@]}")"
    if [ -n "$answer" ]; then
        read -r -a history <<<"$answer"
        decision="${history[0]}" pause="${history[1]}" without_progress="${history[4]}"
        history=("${history[@]:2}")
        return
    fi
    info "the restart policy could not run: see the error above"
    case "$code,$stop" in
        0,*) decision="done" ;;
        78,*) decision=user-error ;;
        75,* | *,1) decision=requeue ;;
        *) exit "$code" ;;
    esac
}

not_requeued() {
    info "not requeued: the job was cancelled, or Slurm requeues it"
    exit 75
}

# Requeue the job and exit. Exits with 1 if Slurm does not: with 75 nobody would notice that it will not continue.
requeue() {
    local pause answer
    for pause in 2 4 8 16 30 60 60 60 0; do
        answer="$(scontrol requeue "$SLURM_JOB_ID" 2>&1)" && exit 75
        info "scontrol requeue: $answer"
        case "$answer,$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T 2>/dev/null)" in
            *disabled*) break ;; # as sbatch --no-requeue asks
            *,RUNNING | *,) sleep "$pause" ;;
            *) not_requeued ;;
        esac
    done
    info "NOT requeued: everything is saved, submit the job again to continue"
    exit 1
}

# Exit because the run was stopped, by whatever `decision` says.
leave() {
    if [ "$decision" = stopped ]; then
        info "stopped by the stop file; submit the job again to continue"
        exit 75
    fi
    job_field %T
    case "$field" in
        RUNNING | "")
            info "stopped after saving: requeueing"
            requeue
            ;;
    esac
    not_requeued
}

# After a crash: the nodes the job still has, which are fewer if --no-kill kept it alive.
count_nodes() {
    job_field '%D %N'
    case "$field" in
        [1-9]*" "?*) read -r nodes hosts <<<"$field" ;;
        GONE) not_requeued ;;
        *) leave ;; # asked to stop
    esac
    if [ "$nodes" -lt "${MIN_NODES:-1}" ]; then
        info "$nodes nodes left, fewer than MIN_NODES=$MIN_NODES: requeueing"
        requeue
    fi
}

asked=
step=
trap 'asked=1; [ -z "$step" ] || kill -USR1 "$step" 2>/dev/null' USR1 TERM
job="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"
history=(0 -1 0 0)

if [ "${DOCTOR:-1}" != 0 ]; then
    run_nodes --job "$job.doctor" --doctor
    [ "$code" -ne 0 ] || code=1 # the hosts are healthy, but the run is not done
    decide
    case "$decision" in
        user-error)
            info "not started: fix the unhealthy hosts, exclude them with sbatch --exclude, or set DOCTOR=0"
            exit 78
            ;;
        stopped | requeue) leave ;;
    esac
fi

start=0
read -r -a history <<<"$(policy)"
[ "${#history[@]}" -eq 4 ] || history=(0 -1 0 0)
while :; do
    id="$job.$start"
    info "start $id of $RUN on $hosts"
    run_nodes --job "$id"
    decide
    case "$decision" in
        done)
            info "done"
            exit 0
            ;;
        user-error)
            info "not restarted: fix what the message above names"
            exit 78
            ;;
        stopped | requeue) leave ;;
    esac

    find "$RUN/logs/$id" -name 'failed-*' 2>/dev/null | sort | head -n 1 | xargs -r cat >&2
    if [ "$decision" = give-up ]; then
        info "giving up: $without_progress starts in a row crashed before training began"
        exit 1
    fi
    rest "$pause"
    count_nodes
    start=$((start + 1))
done
