#!/usr/bin/env bash
# Environment, checks and the suite without its long lane (make faults); more words go to pytest (bash scripts/test.sh tests/test_resume.py -x).
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh requirements-dev.txt
# Tests that need these tools of the system are skipped where they are not.
for pair in strace:strace ip:iproute2 chromium:chromium; do
    tool=${pair%:*} package=${pair#*:}
    if command -v "$tool" > /dev/null; then
        continue
    elif [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
        echo "installing $package for the tests (apt-get)"
        apt-get -qq install -y "$package" > /dev/null 2>&1 ||
            { apt-get -qq update && apt-get -qq install -y "$package"; } > /dev/null 2>&1 ||
            echo "$package could not be installed: tests that need '$tool' are skipped"
    else
        echo "no '$tool' here: tests that need it are skipped; on Debian and Ubuntu: apt-get install $package"
    fi
done
ruff check .
ruff format --check .
mypy
# A worker per core, each with whole files of tests; one alone for what shares a GPU.
workers=auto
case " $* " in *gpu*) workers=0 ;; esac
OMP_NUM_THREADS=1 python -m pytest -n "$workers" --dist loadfile "$@"
