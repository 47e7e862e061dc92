#!/bin/sh
# One machine: a laptop, a GPU, or all GPUs of a node. After an interruption the same command continues.
#
#   sh launch/local.sh [flags of vqvae2_jax.main ...]
set -eu
CONFIG=${CONFIG:-configs/fashion.py}
WORKDIR=${WORKDIR:-runs/$(basename "$CONFIG" .py)}
PYTHON=${PYTHON:-python}

exec "$PYTHON" -m vqvae2_jax.main --config="$CONFIG" --workdir="$WORKDIR" "$@"
