#!/bin/sh
# Cloud TPU VM: creates a slice, installs, runs on all hosts, restarts after preemption, deletes the slice at the end.
#
#   WORKDIR=gs://bucket/runs/imagenet256 REPOSITORY=https://... sh launch/tpu_vm.sh run --job=prior
#
# Or one step of it: create, install, main, stop, delete. All hosts read and write WORKDIR: on a bucket, or on SHARE, an
# NFS share such as a Filestore instance, which may hold data too. `main` continues without this script, until `stop`.
set -eu
TPU=${TPU:-vqvae2}
ZONE=${ZONE:-us-west4-a}
TYPE=${TYPE:-v5litepod-256}
VERSION=${VERSION:-v2-alpha-tpuv5-lite}
SPOT=${SPOT-1} # empty: not preemptible
SHARE=${SHARE:-} # such as 10.0.0.2:/vqvae2; mounted at /mnt/shared
REPOSITORY=${REPOSITORY:?URL to clone this project from}
REVISION=${REVISION:-main} # branch, tag or commit
CONFIG=${CONFIG:-configs/imagenet256.py}
WORKDIR=${WORKDIR:-${SHARE:+/mnt/shared/runs/$(basename "$CONFIG" .py)}}
: "${WORKDIR:?a bucket, such as gs://bucket/runs/imagenet256; or set SHARE}"
WAIT=${WAIT:-60} ATTEMPTS=${ATTEMPTS:-3} # seconds between two attempts; how many on one slice
PROGRAM='^[^ ]*python -m vqvae2_jax.main'

tpu() { gcloud compute tpus tpu-vm "$@" --zone="$ZONE"; }
on_all_hosts() { tpu ssh "$TPU" --worker=all --command="$1"; }
state() { tpu describe "$TPU" --format='value(state)' 2>/dev/null || true; }
quoted() { for word; do printf " '%s'" "$(printf %s "$word" | sed "s/'/'\\\\''/g")"; done; }
create() { tpu create "$TPU" --accelerator-type="$TYPE" --version="$VERSION" ${SPOT:+--spot}; }
delete() { tpu delete "$TPU" --quiet; }
stop() { on_all_hosts "pkill -f '$PROGRAM'; while pgrep -f '$PROGRAM' >/dev/null; do sleep 1; done"; }

install() {
  [ -z "$SHARE" ] || on_all_hosts "sudo apt-get -o DPkg::Lock::Timeout=600 install -y -q nfs-common &&
    sudo mkdir -p /mnt/shared && (mountpoint -q /mnt/shared || sudo mount -t nfs $SHARE /mnt/shared) &&
    sudo install -d -m 777 /mnt/shared/runs" || return
  # The image's own Python is older than 3.11.
  on_all_hosts "(test -d vqvae2_jax || git clone -q $REPOSITORY vqvae2_jax) && cd vqvae2_jax &&
    git fetch -q origin $REVISION && git checkout -q FETCH_HEAD && curl -LsSf https://astral.sh/uv/install.sh | sh &&
    ~/.local/bin/uv venv -q --allow-existing -p 3.12 .venv && ~/.local/bin/uv pip install -q -e '.[tpu,gcs]'"
}

main() {
  on_all_hosts "cd vqvae2_jax && sh launch/detached.sh $(date +%s) .venv/bin/python -m vqvae2_jax.main \
    --config=$CONFIG --workdir=$WORKDIR --distributed$(quoted "$@")"
}

run() {
  failures=0
  until [ "$(state)" = READY ] && stop && install && main "$@"; do
    case $(state) in
      READY) failures=$((failures + 1)) && [ $failures -lt "$ATTEMPTS" ] || exit 1 ;; # not preempted: the slice stays
      '') failures=0 && create || true ;; # training continues from its last checkpoint
      PREEMPTED | TERMINATED) delete || true ;;
    esac
    sleep "$WAIT"
  done
  delete
}

: "${1:?create, install, main, stop, delete or run}"
"$@"
