#!/bin/sh
#SBATCH --job-name=vqvae2
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --open-mode=append
# GPU nodes under Slurm, one process per node. On preemption, or two minutes before the time limit, the job saves and is
# requeued.
#
#   CONFIG=configs/imagenet256.py sbatch launch/slurm.sh --config.parallel.fsdp=8
#
# Start it from the root of the project. All nodes must see that directory and WORKDIR. Install into .venv there before:
# pip install -e ".[cuda]".
set -eu
CONFIG=${CONFIG:-configs/imagenet256.py}
WORKDIR=${WORKDIR:-runs/$(basename "$CONFIG" .py)}
PYTHON=${PYTHON:-.venv/bin/python}

# JAX reads the coordinator and the number of processes from Slurm's variables, but would give each process one GPU.
JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((SLURM_GPUS_ON_NODE - 1)))
export JAX_LOCAL_DEVICE_IDS
status=0
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" \
  "$PYTHON" -m vqvae2_jax.main --config="$CONFIG" --workdir="$WORKDIR" --distributed "$@" || status=$?
# 143: the program received SIGTERM and has saved.
if [ "$status" = 143 ]; then
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$status"
