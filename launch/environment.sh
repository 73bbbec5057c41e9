# Sourced by scripts that need an installation: creates .venv with the pinned versions, once, and activates it.
#
#   prepare_environment [EXTRA]    EXTRA: dev for tests and linters
#
# PYTHON is the interpreter to create it with (default: the first of python3.13, python3.12, python3.11, python3).

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.13 python3.12 python3.11 python3}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "distrain needs Python 3.11 or newer; install it, or run: PYTHON=/path/to/python $0" >&2
    return 78
}

prepare_environment() {
    local extra="${1:-}" python wanted
    local stamp=".venv/installed${extra:+-$extra}"
    wanted="$(cat pyproject.toml docker/constraints.txt | cksum)"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        if [ ! -x .venv/bin/python ]; then
            python="$(find_python)" || return
            echo "creating .venv with $("$python" --version)"
            if ! "$python" -m venv .venv; then
                rm -rf .venv
                echo "$python cannot create virtual environments; on Debian and Ubuntu: apt-get install python3-venv" >&2
                return 78
            fi
        fi
        echo "installing the pinned versions of docker/constraints.txt into .venv (about 7 GB, takes minutes)"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check \
            --constraint docker/constraints.txt --editable ".${extra:+[$extra]}" || return
        echo "$wanted" >"$stamp"
    fi
    # shellcheck disable=SC1091
    . .venv/bin/activate
}
