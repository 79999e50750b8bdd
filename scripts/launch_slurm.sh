#!/usr/bin/env bash
# The old name, for one release.
#SBATCH --job-name=full-sft
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@180
echo "scripts/launch_slurm.sh is now scripts/launch/slurm.sh" >&2
cd "${SLURM_SUBMIT_DIR:?this is a script for sbatch}" # sbatch runs a copy that lies elsewhere
exec bash scripts/launch/slurm.sh "$@"
