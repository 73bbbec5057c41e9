#!/usr/bin/env bash
# One network of a design space per array task, on one GPU: SPACES="configs/sweep/anynetx_e.yaml configs/sweep/regnetx.yaml"
# OUT=runs/small N=50 sbatch --array=0-99%16 slurm/sweep.sh --flops 360MF..400MF train.epochs=10
#
# The array counts over all spaces: N networks of each. Options of `distrain sweep run` and settings of all runs follow
# the script's name. A task that is preempted or loses its node continues from its checkpoint.
#SBATCH --job-name=sweep
#SBATCH --array=0-49%8
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=4:00:00
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A-%a.log

CONFIG="${CONFIG:-configs/regnety_400mf.yaml}"
OUT="${OUT:-runs/sweep}"
RUN="$OUT"
DOCTOR=0
RANKS=1
read -r -d '' -a spaces <<<"${SPACES:-configs/sweep/regnetx.yaml}"
program=(sweep run "${spaces[@]}" "--config=$CONFIG" "--out=$OUT" "--n=${N:-50}" "--member=$SLURM_ARRAY_TASK_ID" "$@")
. "$SLURM_SUBMIT_DIR/launch/batch.sh"
