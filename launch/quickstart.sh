#!/usr/bin/env bash
# From a fresh clone to a trained network: install, fetch CIFAR-10, train on two processes.
# Run it again to resume after an interruption. Arguments are settings: train.epochs=10 run.name=longer
set -euo pipefail
cd "$(dirname "$0")/.."

. launch/environment.sh
prepare_environment

python -m distrain shards fetch cifar10 --out data/cifar10
# Report a mistake in the arguments in one line with its own exit code; torchrun would not.
python -m distrain --config configs/quickstart.yaml "$@" --print-config >/dev/null

ranks="$(python -c 'import torch; print(min(2, torch.cuda.device_count()) or 2)')"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# The host's own name may not resolve: gloo then falls back to loopback with a warning.
export TORCH_CPP_LOG_LEVEL="${TORCH_CPP_LOG_LEVEL:-ERROR}"
exec torchrun --standalone --local-addr localhost --nproc-per-node "$ranks" -m distrain --config configs/quickstart.yaml "$@"
