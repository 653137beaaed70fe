#!/usr/bin/env bash
# One run over the GPUs of one node or several. If a process fails, all restart from the last checkpoint.
#
#     launch/torchrun.sh experiment=figure6 backbone=pythia-1b
#     NNODES=2 RDZV=node0:29500 RUN_ID=one launch/torchrun.sh …        on every node, node0 being one of them
#
# From the environment: NPROC (processes per node, default: its GPUs), NNODES, RDZV (rendezvous host:port), RUN_ID,
# RUN_DIR (default outputs/torchrun-RUN_ID), RESTARTS (default 3), PYTHON (default .venv/bin/python).
set -euo pipefail
cd "$(dirname "$0")/.."

gpus=$({ nvidia-smi -L 2>/dev/null || true; } | wc -l)
NPROC=${NPROC:-$((gpus > 0 ? gpus : 1))}
NNODES=${NNODES:-1}
if [ "$NNODES" -gt 1 ]; then
    : "${RDZV:?host:port of the meeting point, the same on every node}" "${RUN_ID:?a name for the run, the same on every node}"
else
    here=(--local-addr=127.0.0.1)
fi
# without it, a restarted group reads addresses of the previous group from the agent's store (pytorch issue 135712)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
RUN_ID=${RUN_ID:-$(date +%Y-%m-%d-%H-%M-%S)}

exec "${PYTHON:-.venv/bin/python}" -m torch.distributed.run --nnodes="$NNODES" --nproc-per-node="$NPROC" ${here[@]+"${here[@]}"} \
    --rdzv-backend=c10d --rdzv-endpoint="${RDZV:-127.0.0.1:0}" --rdzv-id="$RUN_ID" --max-restarts="${RESTARTS:-3}" \
    train.py trainer.devices="$NPROC" trainer.num_nodes="$NNODES" \
    hydra.run.dir="${RUN_DIR:-outputs/torchrun-$RUN_ID}" ckpt_path=last "$@"
