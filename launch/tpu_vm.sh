#!/bin/sh
# Cloud TPU VM: creates a slice, installs, runs on all its hosts, starts again after preemption, deletes it at the end.
#
#   WORKDIR=gs://bucket/runs/imagenet256 REPOSITORY=https://... sh launch/tpu_vm.sh run --job=prior
#
# Or one step of it: create, install, main, delete. All hosts read and write WORKDIR: on a bucket, or on SHARE, an NFS
# share such as a Filestore instance, which may hold data too.
set -eu
TPU=${TPU:-vqvae2}
ZONE=${ZONE:-us-west4-a}
TYPE=${TYPE:-v5litepod-256}
VERSION=${VERSION:-v2-alpha-tpuv5-lite}
SPOT=${SPOT:-1} # 0: not to be preempted
SHARE=${SHARE:-} # such as 10.0.0.2:/vqvae2; mounted at /mnt/shared
REPOSITORY=${REPOSITORY:?where to clone this project from}
CONFIG=${CONFIG:-configs/imagenet256.py}
WORKDIR=${WORKDIR:-${SHARE:+/mnt/shared/runs/$(basename "$CONFIG" .py)}}
: "${WORKDIR:?a bucket, such as gs://bucket/runs/imagenet256; or set SHARE}"
WAIT=${WAIT:-60} # seconds between two attempts

tpu() { gcloud compute tpus tpu-vm "$@" --zone="$ZONE"; }
on_all_hosts() { tpu ssh "$TPU" --worker=all --command="$1"; }
is_ready() { [ "$(tpu describe "$TPU" --format='value(state)' 2>/dev/null)" = READY ]; }

create() {
  if [ "$SPOT" = 0 ]; then set --; else set -- --spot; fi
  tpu create "$TPU" --accelerator-type="$TYPE" --version="$VERSION" "$@"
}

install() {
  if [ "$SHARE" ]; then
    on_all_hosts "sudo apt-get install -y -q nfs-common && sudo mkdir -p /mnt/shared &&
      (mountpoint -q /mnt/shared || sudo mount -t nfs $SHARE /mnt/shared)" || return
  fi
  on_all_hosts "(test -d vqvae2_jax || git clone -q $REPOSITORY vqvae2_jax) && cd vqvae2_jax &&
    python3 -m venv .venv && .venv/bin/pip install -q -e '.[tpu,gcs]'"
}

main() {
  on_all_hosts "cd vqvae2_jax && .venv/bin/python -m vqvae2_jax.main --config=$CONFIG --workdir=$WORKDIR --distributed $*"
}

delete() { tpu delete "$TPU" --quiet; }

run() {
  until is_ready && install && main "$@"; do
    if is_ready; then exit 1; fi # not preempted: the error is the program's
    # A preempted slice is deleted before it is created again; the training goes on from its last checkpoint.
    delete 2>/dev/null || true
    create || sleep "$WAIT"
  done
  delete
}

command=${1:?create, install, main, delete or run}
shift
"$command" "$@"
