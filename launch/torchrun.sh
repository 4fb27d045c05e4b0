#!/usr/bin/env bash
# Runs `pretrain train` on every GPU of this node, under torchrun.
#
#   launch/torchrun.sh CONFIG [--set key=value ...]
#
# Environment:
#   NPROC         processes on this node (default: one per visible GPU; 1 where there is none)
#   NNODES        nodes (default: 1). With more, run the same command on each, with the same values of:
#   MASTER_ADDR   host name or address of one of the nodes
#   MASTER_PORT   a free port there (default: 29500)
#   RUN_ID        any name, different for jobs that share a host and port (default: pretrain)
#   MAX_RESTARTS  times that torchrun starts all workers again after one failed (default: 0)
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source-path=SCRIPTDIR source=env.sh
source "$here/env.sh"

if (($# == 0)); then
    echo "usage: [NPROC=...] [NNODES=... MASTER_ADDR=...] launch/torchrun.sh CONFIG [--set key=value ...]" >&2
    exit 2
fi

# torchrun's own word `gpu` counts the devices that CUDA_VISIBLE_DEVICES leaves.
nproc="${NPROC:-$(if nvidia-smi -L >/dev/null 2>&1; then echo gpu; else echo 1; fi)}"
nnodes="${NNODES:-1}"

if ((nnodes == 1)); then
    rendezvous=(--standalone) # a free port of this host
else
    : "${MASTER_ADDR:?must name one of the nodes when NNODES is above 1}"
    rendezvous=(
        --nnodes="$nnodes"
        --rdzv-backend=c10d
        --rdzv-endpoint="$MASTER_ADDR:${MASTER_PORT:-29500}"
        --rdzv-id="${RUN_ID:-pretrain}"
    )
fi

# torchrun dies of SIGUSR1 unless it is told to pass it on. It waits TORCH_ELASTIC_SHUTDOWN_TIMEOUT for the workers,
# which save and end; its own exit code is then 1, not theirs.
exec torchrun "${rendezvous[@]}" --nproc-per-node="$nproc" --max-restarts="${MAX_RESTARTS:-0}" \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    --no-python pretrain train "$@"
