# Sourced by the other scripts, in the project's root: a virtual environment in .venv that holds the named requirements,
# made anew only when they change.   usage: . scripts/environment.sh requirements.txt

requirements=$1
# Directory of the virtual environment; another one keeps a project with several Pythons apart.
VENV=${VENV:-.venv}
PYTHON=${PYTHON:-python3}
if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "error: Python 3.11 or newer is needed, '$PYTHON' is not; name one: PYTHON=/path/to/python3.12 bash $0" >&2
    exit 2
fi
wanted=$(cat requirements.txt "$requirements" | sha256sum | cut -d' ' -f1)
if [ ! -x "$VENV/bin/python" ] || ! grep -qs "$wanted" "$VENV/.requirements"; then
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
export PATH="$PWD/$VENV/bin:$PATH" TOKENIZERS_PARALLELISM=false
