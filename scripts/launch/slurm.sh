#!/usr/bin/env bash
# Train on the nodes of a Slurm job; submit it from the project's root:
#   sbatch --nodes 2 --gpus-per-node 8 --time 24:00:00 scripts/launch/slurm.sh [flags of train_full_sft.py]
# Options given to sbatch win over the lines below. There is a process for each GPU of a node, or PROCESSES_PER_NODE.
#SBATCH --job-name=full-sft
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
# A job that is preempted, or loses a node, is queued again by Slurm, and goes on from its newest checkpoint.
#SBATCH --requeue
# 180 s before the time is up this script is told, and nobody else.
#SBATCH --signal=B:USR1@180
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?this is a script for sbatch}" # sbatch runs a copy that lies elsewhere
if [ ! -f scripts/launch/multi_node.sh ]; then
    echo "error: submit this from the project's root, $PWD is another directory" >&2
    exit 2
fi
. scripts/environment.sh requirements.txt # once, before the nodes start
save_dir=$(save_dir_of . --from_resume 1 "$@")

progress() { # status of the run and its step
    python -c 'import json, sys; s = json.load(open(sys.argv[1])); print(s["status"], s["step"])' \
        "$save_dir/state.json" 2> /dev/null || echo none 0
}

asked_to_stop=no
# The tasks get SIGTERM from Slurm: srun would answer a SIGTERM of its own by killing them.
trap 'asked_to_stop=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
export PET_SHUTDOWN_TIMEOUT=${PET_SHUTDOWN_TIMEOUT:-150} # seconds that torchrun gives a step and its checkpoint
read -r _ step_before <<< "$(progress)"
read -r host <<< "$(scontrol show hostnames "$SLURM_JOB_NODELIST")" # the first line of several
port=$((20000 + SLURM_JOB_ID % 10000)) # jobs that share a node do not meet
srun --nodes "$SLURM_NNODES" --ntasks "$SLURM_NNODES" --ntasks-per-node 1 --kill-on-bad-exit=1 \
    ${SLURM_CPUS_PER_TASK:+--cpus-per-task "$SLURM_CPUS_PER_TASK"} \
    bash scripts/launch/multi_node.sh "$host:$port" "$SLURM_NNODES" "${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}" "$@" &

code=138 # 128 + SIGUSR1: the signal has ended the waiting, not srun
while [ "$code" -eq 138 ]; do
    code=0
    wait $! || code=$?
done
read -r status step <<< "$(progress)"
# A failure is not tried again, nor is a run that had no time for a single step: it would never end.
if [ "$asked_to_stop" = yes ] && [ "$status" = stopped ] && [ "$step" -gt "$step_before" ]; then
    echo "time is up after step $step: the job is queued again"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
