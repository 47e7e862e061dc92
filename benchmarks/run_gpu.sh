#!/usr/bin/env bash
# The first run on a GPU, in at most 10 minutes: results against a CPU, measured against modeled times, flags of XLA.
#
#   benchmarks/run_gpu.sh [OUT]              # writes one JSON file, runs/gpu-run.json if OUT is not given
#   benchmarks/run_gpu.sh --rehearse [OUT]   # on a CPU, with small sizes
#
# The exit status is 0 if all checks ran and passed. benchmarks/gpu_run.py describes them.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python}" -m benchmarks.gpu_run "$@"
