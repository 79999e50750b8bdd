#!/usr/bin/env bash
# Environment, checks and the whole suite; more words go to pytest (bash scripts/test.sh tests/test_resume.py -x).
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh requirements-dev.txt
ruff check .
ruff format --check .
mypy
OMP_NUM_THREADS=1 python -m pytest "$@"
