#!/usr/bin/env bash
# Train on N devices of this machine:   bash scripts/launch_single_node.sh N [flags of train_full_sft.py]
set -euo pipefail
cd "$(dirname "$0")/.."
if ! [[ "${1:-}" =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: bash scripts/launch_single_node.sh N [flags of train_full_sft.py], N = processes (one per GPU)" >&2
    exit 2
fi
processes=$1
shift
. scripts/environment.sh requirements.txt
cores=$(python -c 'import os; print(len(os.sched_getaffinity(0)))')
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}
exec torchrun --standalone --nproc_per_node "$processes" train_full_sft.py "$@"
