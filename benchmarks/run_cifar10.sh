#!/bin/sh
# CIFAR-10 from raw archives to every number of the report, on one GPU. Stopped, the same command continues.
#
#   sh benchmarks/run_cifar10.sh DATA [flags of vqvae2_jax.main ...]
#
# DATA holds cifar-10-binary.tar.gz, or cifar10_train_a.zip and cifar10_train_b.zip (benchmarks/cifar10_npz.py), and, where
# there is no network, the weights of the Inception network: fid_inception*.npz or pt_inception-2015-12-05-6726825d.pth.
# The report, its pictures and small files go to benchmarks/results/cifar10/.
set -eu
data=$1
shift
run=${RUN:-runs/cifar10}
python=${PYTHON:-python}

if [ ! -f data/cifar10.npz ]; then
  if [ -f "$data/cifar-10-binary.tar.gz" ]; then
    $python -m benchmarks.cifar10_npz "$data/cifar-10-binary.tar.gz" data/cifar10.npz
  else
    $python -m benchmarks.cifar10_npz "$data"/cifar10_train_*.zip data/cifar10.npz
  fi
fi

inception=fetch
for file in "$data"/fid_inception*.npz; do
  [ -f "$file" ] && inception="$data/fid_inception*.npz"
done
[ -f "$data/pt_inception-2015-12-05-6726825d.pth" ] && inception="$data/pt_inception-2015-12-05-6726825d.pth"

$python -m vqvae2_jax.main --config=configs/cifar10.py --workdir="$run" --config.data.name=npz \
  --config.data.path=data/cifar10.npz --config.data.splits="()" --config.evaluate.inception="$inception" "$@"

mkdir -p benchmarks/results/cifar10
cp "$run"/report/*.png "$run"/report/report.json "$run"/report/report.html benchmarks/results/cifar10/
for stage in vqvae prior_top prior_bottom classifier; do
  cp "$run/$stage/metrics.jsonl" "benchmarks/results/cifar10/$stage.jsonl"
done
