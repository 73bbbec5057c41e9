#!/usr/bin/env bash
# Installs what the tests need and runs them. Arguments go to pytest; without any, the slow tests stay out.
set -euo pipefail
cd "$(dirname "$0")/.."

. launch/environment.sh
prepare_environment dev

if [ $# -eq 0 ]; then
    set -- -m "not slow"
fi
# Most tests wait for processes that they have started: two at a time keep two cores busy.
exec python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"
