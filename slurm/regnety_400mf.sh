#!/usr/bin/env bash
#SBATCH --job-name=regnety_400mf
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

CONFIG=configs/regnety_400mf.yaml
. "$SLURM_SUBMIT_DIR/launch/batch.sh"
