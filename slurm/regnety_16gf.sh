#!/usr/bin/env bash
#SBATCH --job-name=regnety_16gf
#SBATCH --nodes=4
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

CONFIG=configs/regnety_16gf.yaml
. "$SLURM_SUBMIT_DIR/launch/batch.sh"
