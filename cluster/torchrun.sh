#!/bin/bash
# The same command on every node, without a scheduler:
#
#   NODES=2 GPUS=8 FIRST=node0.example cluster/torchrun.sh +experiment=base_22k data.train=... name=...
#
# FIRST is the address of one of the nodes, PORT a free port there. The nodes wait for each other for JOIN seconds.
# A process that dies ends all; torchrun then starts them again, RESTARTS times at most, from the last checkpoint.
set -eu
: "${NODES:=1}" "${GPUS:=gpu}" "${FIRST:=127.0.0.1}" "${PORT:=29500}" "${RESTARTS:=3}" "${JOIN:=600}" "${RUN:=beit}"

exec torchrun \
  --nnodes="$NODES" --nproc-per-node="$GPUS" --max-restarts="$RESTARTS" \
  --rdzv-backend=c10d --rdzv-endpoint="$FIRST:$PORT" --rdzv-id="$RUN" --rdzv-conf="join_timeout=$JOIN" \
  -m beit_pretrain fit "$@"
