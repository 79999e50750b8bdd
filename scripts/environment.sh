# Sourced by the other scripts, in the project's root: a virtual environment in .venv that holds the named requirements,
# made anew only when they change.   usage: . scripts/environment.sh requirements.txt

requirements=$1

share_cores() { # share_cores N: the threads of each of N processes on this machine
    local cores
    cores=$(python -c 'import os; print(len(os.sched_getaffinity(0)))')
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > $1 ? cores / $1 : 1))}
}

save_dir_of() { # save_dir_of ROOT [flags of train_full_sft.py]: prints --save_dir, or what is wrong with the flags
    PYTHONPATH=$1 python -c 'from training.config.command_line import config_from_command_line as c; print(c().save_dir)' "${@:2}"
}

export TOKENIZERS_PARALLELISM=false
# Directory of the virtual environment; another one keeps a project with several Pythons apart. VENV=none takes the Python
# and the packages that are there (of a container, of a module) and installs nothing.
VENV=${VENV:-.venv}
if [ "$VENV" = none ]; then return; fi
PYTHON=${PYTHON:-python3}
if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "error: Python 3.11 or newer is needed, '$PYTHON' is not; name one: PYTHON=/path/to/python3.12 bash $0" >&2
    exit 2
fi
wanted=$(cat requirements.txt "$requirements" | sha256sum | cut -d' ' -f1)
is_ready() { [ -x "$VENV/bin/python" ] && grep -qs "$wanted" "$VENV/.requirements"; }
if ! is_ready; then # nodes that share this directory start together: one installs, the others wait for it
    exec 9> "$VENV.lock"
    flock 9
fi
if ! is_ready; then
    echo "installing $requirements into $VENV (once)"
    [ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV" || {
        echo "error: no virtual environment; on Debian and Ubuntu: apt-get install python3-venv" >&2
        exit 2
    }
    # torch comes first and alone: the other packages then find it and do not choose a build of their own. A build of the
    # same version that is there already (for another CUDA, say) is kept.
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' requirements.txt)"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -r "$requirements"
    # The dev requirements hold the others: an environment made for the tests also serves training.
    for file in requirements.txt "$requirements"; do
        cat requirements.txt "$file" | sha256sum | cut -d' ' -f1
    done > "$VENV/.requirements"
fi
exec 9>&-
export PATH="$PWD/$VENV/bin:$PATH"
