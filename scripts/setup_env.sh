#!/usr/bin/env bash
# Gives the other scripts a Python that can run the project. They source it:
#
#     source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
#     "$PYTHON" "$ROOT/tokenizer/train_provq.py" "$@"
#
# Sets and exports ROOT (the repository root), PYTHON (an absolute path) and GOMP_SPINCOUNT; does not change the working
# directory.
#   PYTHON=/path/to/python   use that interpreter as it is, install nothing
#   otherwise                .venv in the repository root, made on the first call and brought up to date when
#                            requirements.txt changes; `python3` makes it. pip reads its usual PIP_* variables.
#   PROVQ_SETUP_DEV=1        also install requirements-dev.txt (what the tests need), and requirements-dev-alone.txt
#                            without dependencies
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

setup_env_fail() {
    printf 'setup_env: %s\n' "$@" >&2
    exit 1
}

# setup_env_check_version INTERPRETER WHAT_TO_DO
setup_env_check_version() {
    local version
    version="$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" ||
        setup_env_fail "cannot run the Python interpreter '$1'." "$2"
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        setup_env_fail "'$1' is Python $version, but ProVQ needs Python 3.10 or newer." "$2"
}

setup_env_use_given() {
    local problem
    setup_env_check_version "$PYTHON" "Set PYTHON to one that exists and is new enough, or unset it to get a .venv."
    PYTHON="$("$PYTHON" -c 'import sys; print(sys.executable)')"
    problem="$("$PYTHON" -c 'import torch' 2>&1)" ||
        setup_env_fail "PYTHON=$PYTHON cannot import torch: ${problem##*$'\n'}" \
            "Run '$PYTHON -m pip install -r $ROOT/requirements.txt', or unset PYTHON to get a .venv."
}

# A copy of each installed requirements file serves as the stamp. A copy cut short differs from its original, so an
# interrupted run is repeated.
setup_env_up_to_date() {
    local venv="$1" file
    shift
    "$venv/bin/python" -c 'pass' 2>/dev/null || return 1
    for file in "$@"; do
        [ -f "$venv/installed-$file" ] || return 1
        [ "$(cat "$venv/installed-$file")" = "$(cat "$ROOT/$file")" ] || return 1
    done
}

# Of the function below, whose log it goes on with.
setup_env_pip() {
    if ! "$PYTHON" -m pip install --disable-pip-version-check --progress-bar off "$@" >>"$log" 2>&1; then
        tail -n 20 "$log" >&2
        setup_env_fail "pip could not install ${files[*]} (its last lines are above, all of them in $log)." \
            "Run again once that is fixed, or use a Python that already has them: PYTHON=/path/to/python bash $0"
    fi
}

setup_env_make_venv() {
    local venv="$ROOT/.venv" log="$ROOT/.venv/install.log" files=(requirements.txt) file
    local pip_args=()
    if [ "${PROVQ_SETUP_DEV:-0}" = 1 ]; then files+=(requirements-dev.txt requirements-dev-alone.txt); fi
    PYTHON="$venv/bin/python"
    if setup_env_up_to_date "$venv" "${files[@]}"; then return; fi

    if ! "$PYTHON" -c 'pass' 2>/dev/null; then  # absent, or the Python that it was made from is gone
        setup_env_check_version python3 "Install a newer Python, or set PYTHON=/path/to/python (with torch installed)."
        echo "setup_env: creating $venv with $(python3 --version)"
        python3 -m venv --clear "$venv" ||
            setup_env_fail "python3 -m venv failed (message above; Debian and Ubuntu need python3-venv for it)." \
                "Install that, or set PYTHON=/path/to/python (with torch installed)."
    fi
    setup_env_check_version "$PYTHON" "Delete $venv and run again."
    if ! "$PYTHON" -m pip --version >/dev/null 2>&1; then  # creation interrupted, or made by a tool that leaves pip out
        { "$PYTHON" -m ensurepip && "$PYTHON" -m pip --version; } >/dev/null ||
            setup_env_fail "$venv has no working pip (message above)." "Delete $venv and run again."
    fi

    rm -f "$venv"/installed-requirements*.txt  # from here to the end of the install nothing is known about .venv
    for file in "${files[@]}"; do [[ $file = *-alone.txt ]] || pip_args+=(-r "$ROOT/$file"); done
    rm -f "$log"
    echo "setup_env: installing ${files[*]} into $venv (several GB the first time; log: $log)"
    # One pip call, so that torch and torchvision are resolved together.
    setup_env_pip "${pip_args[@]}"
    for file in "${files[@]}"; do
        [[ $file != *-alone.txt ]] || setup_env_pip --no-deps -r "$ROOT/$file"
        cp "$ROOT/$file" "$venv/installed-$file"
    done
}

if [ -n "${PYTHON:-}" ]; then
    setup_env_use_given
else
    setup_env_make_venv
fi
# GNU OpenMP's threads, with which torch computes on a CPU, spin for long before they sleep. Where other programs want the
# same cores that makes training many times slower; a tenth of its spinning costs a few percent on an idle machine.
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-10000}"
export ROOT PYTHON
