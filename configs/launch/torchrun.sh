#!/usr/bin/env bash
# Several machines without a scheduler: run this on each of them, with the same HEAD and a folder that all of them see.
#
#   HEAD=node1 NODES=4 GPUS=8 bash configs/launch/torchrun.sh --backbone llama --model DIR --data alpaca.json \
#       --preset alpaca/llama-7b --output /shared/runs/a
#
# What follows the script's name is given to zinit train. The machines find each other at HEAD; which one is which they
# settle there. A process that dies starts all of them anew, up to RESTARTS times, from the last checkpoint.
set -euo pipefail

exec torchrun \
  --nnodes "${NODES:-2}" --nproc-per-node "${GPUS:-8}" --max-restarts "${RESTARTS:-3}" \
  --rdzv-backend c10d --rdzv-endpoint "${HEAD:?the name or address of one of the machines}:${PORT:-29500}" \
  --rdzv-id "${JOB:-zinit}" \
  -m zinit train "$@"
