#!/usr/bin/env bash
# One learning rate per array task, two tasks at a time; each is a separate run: runs/regnety_400mf-0 to -3.
#SBATCH --job-name=sweep_lr
#SBATCH --array=0-3%2
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A-%a.log

rates=(0.4 0.8 1.2 1.6)
EXTRA="optimizer.lr=${rates[$SLURM_ARRAY_TASK_ID]} ${EXTRA:-}"
RUN="${RUN:-runs/regnety_400mf}-$SLURM_ARRAY_TASK_ID"
CONFIG=configs/regnety_400mf.yaml
. "$SLURM_SUBMIT_DIR/launch/batch.sh"
