#!/usr/bin/env bash
# From a fresh clone to a model that answers: environment, training of the embedded demo on all devices, evaluation on
# prompts that training never saw, and where everything is. More flags go to the trainer.
set -euo pipefail
cd "$(dirname "$0")/.."
started=$(date +%s)
. scripts/environment.sh requirements.txt

run=runs/demo
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
cores=$(python -c 'import os; print(len(os.sched_getaffinity(0)))')
processes=$([ "$gpus" -gt 0 ] && echo "$gpus" || { [ "$cores" -ge 2 ] && echo 2 || echo 1; })
export OMP_NUM_THREADS=$((cores / processes))

echo "== training the demo with $processes processes ($gpus GPUs, $cores cores)"
torchrun --standalone --nproc_per_node "$processes" train_full_sft.py --config configs/demo.yaml --save_dir "$run" --overwrite 1 "$@"

echo "== answering prompts that training never saw"
export OMP_NUM_THREADS=$cores
python -m scripts.evaluate "$run" --show 8

echo "== done in $(($(date +%s) - started)) s"
echo "model         $run/final"
echo "metrics       $run/metrics.jsonl"
echo "evaluation    $run/evaluation.json"
echo "talk to it    .venv/bin/python -m scripts.chat $run"
