#!/usr/bin/env bash
# Makes the environment once, then runs the notebooks, the tests or JupyterLab, or builds the book: ./run_all.sh --help.
set -eo pipefail
unset CDPATH
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
VENV=$ROOT/.venv
BOOK=(myst_nb sphinx_book_theme sphinx-mathjax-offline)
SECONDS=0

fail() { # fail CODE SENTENCE
    echo "run_all.sh: $2" >&2
    exit "$1"
}

has() { # has PYTHON MODULE...: this interpreter is new enough to know -P and finds every module
    "$1" -P -c 'import sys; from importlib.util import find_spec; sys.exit(not all(map(find_spec, sys.argv[1:])))' \
        "${@:2}" >/dev/null 2>&1
}

find_python() { # prints the first python3 that can make the environment
    local name found
    for name in python3 python3.13 python3.12 python3.11; do
        if "$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    found=$(python3 --version 2>/dev/null) || found="no python3"
    fail 1 "Python 3.11 or newer with venv is needed, and here is $found; install one and run this again."
}

stamp() { # what the environment was made from; a moved folder counts, since scripts in .venv hold its path
    { echo "$ROOT" && cat "$ROOT/requirements.lock" "$ROOT/pyproject.toml"; } | cksum
}

is_own() { # this script made what is in .venv, or nothing is: its mark is made.by, of earlier versions the two files they left
    [ ! -L "$VENV" ] && { [ ! -e "$VENV" ] || [ -f "$VENV/made.by" ] || { [ -d "$VENV" ] && [ -z "$(ls -A "$VENV")" ]; } ||
        { [ -f "$VENV/make.log" ] && grep -Eqx '[0-9]+ [0-9]+' "$VENV/stamp" 2>/dev/null; }; }
}

is_whole() { [ -x "$VENV/bin/python" ] && [ "$(cat "$VENV/stamp" 2>/dev/null)" = "$(stamp)" ]; }

can_write() { # can_write FOLDER: or what it would be made in; permission bits say nothing of a read-only disk, or to root
    local folder=$1
    until [ -e "$folder" ]; do folder=$(dirname "$folder"); done
    folder=$(mktemp -d "$folder/.run_all.XXXXXX" 2>/dev/null) && rmdir "$folder"
}

spare_home() { # what would go to folders of HOME that cannot be written goes beside the environment
    local pair name folder lacking=
    for pair in XDG_CACHE_HOME=.cache MPLCONFIGDIR=.config/matplotlib IPYTHONDIR=.ipython JUPYTER_CONFIG_DIR=.jupyter \
        JUPYTER_DATA_DIR=.local/share/jupyter; do
        name=${pair%%=*}
        folder=${!name:-$HOME/${pair#*=}}
        if ! can_write "$folder"; then
            lacking+=${lacking:+, }$folder
            export "$name=$VENV.home/${pair#*=}"
        fi
    done
    if [ -n "$lacking" ]; then echo "Cannot write to $lacking; $VENV.home is used instead."; fi
}

reason() { # what the log says last of an error and of its cause: pip's, which names the cause before, or uv's
    awk '{ sub(/^[ \t]+/, "") }
        NF { last = $0 }
        /^WARNING: Retrying/ { sub(/.*(broken by .|>: )/, ""); sub(/.\).: [^ ]*$/, ""); retried = ": " $0 }
        /^ERROR: / { said = substr($0, 8); cause = retried }
        /^error: |^× / { sub(/^[^ ]+ /, ""); said = $0; cause = "" }
        /^cause: |^Caused by: |^(├|╰)─▶ / { sub(/^(Caused )?[^ ]+ /, ""); cause = ": " $0 }
        END { print said ? said cause : last ? last : "nothing was said" }' "$1"
}

make_environment() {
    local python log=$VENV/make.log
    python=$(find_python) || exit
    { : >>"$VENV.lock"; } 2>/dev/null || fail 1 "Cannot write to $ROOT, where the environment is to be made."
    exec 9>>"$VENV.lock" # two calls at once make it once; macOS has no flock(1), and the lock outlives this python
    "$python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'
    if ! is_whole; then
        is_own || fail 1 "$VENV is a link or not made by this script, so it is left as it is: activate it if it has the \
package and its extras, or move it away and run this again."
        echo "Making the environment in $VENV (once, about a minute) ..."
        mkdir -p "$VENV" && echo run_all.sh >"$VENV/made.by" # first, so that an interrupted make is known as its own
        find "$VENV" -mindepth 1 -maxdepth 1 ! -name made.by -exec rm -rf {} +
        "$python" -m venv "$VENV" || fail 1 "$python could not make $VENV; the reason stands above."
        export UV_NO_WRAP=1 # `reason` reads lines
        { # compiled now, since a machine that sets PYTHONDONTWRITEBYTECODE would do it at every import
            "$VENV/bin/python" -m pip install --quiet uv &&
                "$VENV/bin/uv" pip sync --python "$VENV/bin/python" --compile-bytecode --require-hashes \
                    "$ROOT/requirements.lock" &&
                "$VENV/bin/uv" pip install --python "$VENV/bin/python" --no-deps --no-build-isolation -e "$ROOT"
        } >"$log" 2>&1 || fail 1 "The environment could not be made: $(reason "$log"). All that was said is in $log; mend it and \
run this again."
        stamp >"$VENV/stamp" # last, so that an interrupted make is done again
    fi
    exec 9>&-
}

use_environment() { # use_environment MODULE...: sets PYTHON to an interpreter that has the package and these modules
    local name
    spare_home
    for name in SIDAE_DATA SIDAE_RUNS SIDAE_RECORDS SIDAE_FIGURES SIDAE_BUNDLE; do # a kernel works in another folder
        case ${!name} in "" | [/~]*) ;; *) export "$name=$PWD/${!name}" ;; esac
    done
    if ! PYTHON=$(active "$@"); then
        is_whole || make_environment
        PYTHON=$VENV/bin/python
    fi
    export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH} # an active environment may hold the package of another checkout
}

active() { # active MODULE...: prints the interpreter of an active environment that has the package and these modules
    local prefix
    for prefix in "$VIRTUAL_ENV" "$CONDA_PREFIX"; do
        if [ -n "$prefix" ] && has "$prefix/bin/python" sidae_lib torch "$@"; then echo "$prefix/bin/python" && return; fi
    done
    return 1
}

run_notebooks() {
    local python said modules=(papermill ipykernel ipywidgets "${BOOK[@]}")
    python=$(active "${modules[@]}") || { is_whole && python=$VENV/bin/python; } || python=$(find_python) || exit
    said=$(PYTHONPATH=$ROOT "$python" -P -m sidae_lib notebooks --look "$@") || exit # before an environment is made
    if [ -n "$said" ]; then echo "$said" && exit; fi # it is the help
    use_environment "${modules[@]}"
    exec "$PYTHON" -P -m sidae_lib notebooks "$@"
}

limited() { # limited COMMAND...: what is left of an hour
    local code=0 limit=()
    if command -v timeout >/dev/null; then limit=(timeout --foreground -s INT -k 30 $((3600 - SECONDS))); fi
    "${limit[@]}" "$@" || code=$?
    if [ $code = 124 ] || [ $code = 137 ]; then fail 1 "The tests took more than 60 minutes and were stopped."; fi
    return $code
}

stage() { # stage NAME COMMAND...: says when it begins and ends, and how long it took
    local begin=$SECONDS code=0
    echo "[$1 begins]"
    "${@:2}" || code=$?
    echo "[$1 ended after $((SECONDS - begin)) s]"
    return $code
}

run_tests() {
    local code=0 pytest scratch arg args=()
    stage environment use_environment papermill ipykernel pytest xdist nbval hypothesis scipy "${BOOK[@]}"
    for arg in "$@"; do # a file is the caller's where it is one
        case $arg in *.py* | *.ipynb*) [ ! -e "./${arg%%::*}" ] || arg=$PWD/$arg ;; esac
        args+=("$arg")
    done
    cd "$ROOT"
    "$PYTHON" -m compileall -q sidae_lib || true # once, since where nothing is cached each process of a test would do it
    pytest=(limited "$PYTHON" -m pytest --durations=15)
    case "$*" in
        "" | --all)
            scratch=$(mktemp -d)
            trap 'rm -rf "$scratch"' EXIT
            export SIDAE_TESTED=$scratch/tested # for a last line that speaks of both
            stage tests "${pytest[@]}" -n auto --dist worksteal "$@" || code=1
            stage notebooks "${pytest[@]}" -n auto --dist loadfile notebooks || code=1
            cat "$SIDAE_TESTED.line" || code=1
            ;;
        *) "${pytest[@]}" "${args[@]}" || code=1 ;;
    esac
    return $code
}

case $1 in
    test) run_tests "${@:2}" ;;
    book)
        use_environment papermill ipykernel "${BOOK[@]}"
        exec "$PYTHON" -P -m sidae_lib book "${@:2}"
        ;;
    lab)
        use_environment jupyterlab ipywidgets
        exec "$PYTHON" -m jupyterlab "${@:2}" "$ROOT/notebooks"
        ;;
    *) run_notebooks "$@" ;;
esac
