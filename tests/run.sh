#!/usr/bin/env bash
# Install what the tests need and run them. Arguments go to pytest; without any, slow tests are deselected.
set -euo pipefail
cd "$(dirname "$0")/.."

. launch/environment.sh
prepare_environment dev

if [ $# -eq 0 ]; then
    set -- -m "not slow"
fi
# Most tests wait for processes that they started, so three workers keep two cores busy.
exec python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder --durations 30 "$@"
