#!/usr/bin/env bash
# From a fresh clone to a trained network: installs, fetches CIFAR-10, trains on two processes.
# Run it again after a kill and it goes on where it was. Arguments change the run: train.epochs=10 run.name=longer
set -euo pipefail
cd "$(dirname "$0")/.."

. launch/environment.sh
prepare_environment

python -m distrain shards fetch cifar10 --out data/cifar10
# A mistake in the arguments is told here, in one line and with its own exit code.
python -m distrain --config configs/quickstart.yaml "$@" --print-config >/dev/null

ranks="$(python -c 'import torch; print(min(2, torch.cuda.device_count()) or 2)')"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec torchrun --standalone --nproc-per-node "$ranks" -m distrain --config configs/quickstart.yaml "$@"
