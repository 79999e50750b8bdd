#!/usr/bin/env bash
# Train on N devices of this machine:   bash scripts/launch/single_node.sh N [flags of train_full_sft.py]
# Relative paths in the flags are those of the directory that it is called from.
set -euo pipefail
if ! [[ "${1:-}" =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: bash scripts/launch/single_node.sh N [flags of train_full_sft.py], N = processes (one per GPU)" >&2
    exit 2
fi
processes=$1
shift
root=$(cd "$(dirname "$0")/../.." && pwd)
cd "$root"
. scripts/environment.sh requirements.txt
cd "$OLDPWD"
share_cores "$processes"
# SIGUSR1 asks the trainer for a checkpoint. torchrun, who knows only signals that end a run, is made deaf to it, and so
# are its processes until they train.
trap '' USR1
exec torchrun --standalone --nproc_per_node "$processes" "$root/train_full_sft.py" "$@"
