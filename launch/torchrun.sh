#!/usr/bin/env bash
# Checks this host, then trains on it with torchrun: bash launch/torchrun.sh key=value ...   (kontext-train's options)
#   one node:   RANKS=8 bash launch/torchrun.sh ...                         RANKS: on this node; as many as it has GPUs
#   many:       NODES=4 HEAD=node1:29400 bash launch/torchrun.sh ...        the same command on every node
# MAX_RESTARTS=2  times that ranks are started again, from the newest checkpoint, after one of them failed
# GPUS=8          that this host must have; without it any number will do
# RUN_ID          of these nodes among others that may meet at HEAD
# FROZEN_S=60     that torchrun may fail to notice the end of its ranks, as it does when the head is out of reach
# Exit status 75: a signal asked it to stop, it has saved, and the same command goes on. Another one: it failed.
set -euo pipefail
trap '' USR1  # Slurm sends it to every process of a step. Ranks catch it; this shell and torchrun would die of it
HERE=$(dirname "${BASH_SOURCE[0]}")
PYTHON=${PYTHON:-python3}
NODES=${NODES:-1}
if [ "$NODES" != 1 ] && [ -z "${HEAD:-}" ]; then
  echo "launch: $(hostname): NODES=$NODES needs HEAD=HOST:PORT, where they meet: the same on each" >&2
  exit 2
fi
found=$("$PYTHON" "$HERE/check_host.py" --nodes "$NODES" ${HEAD:+--head "$HEAD"} ${RANKS:+--ranks "$RANKS"} \
  ${GPUS:+--gpus "$GPUS"})
eval "$found"  # IS_HEAD ADDRESS INTERFACE RANKS

if [ "$NODES" != 1 ]; then  # gloo, which carries what is not on a GPU, would take what the host's name resolves to
  export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$INTERFACE}
fi
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}  # seconds to save in after a SIGTERM
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}

# torchrun takes every status but 0 for a failure, starts ranks again and says 1. So ranks that saved tell by this file.
KONTEXT_TRAIN_INTERRUPTED=$(mktemp -u "${TMPDIR:-/tmp}/kontext_train.XXXXXXXX")
export KONTEXT_TRAIN_INTERRUPTED
# read_timeout: seconds, several times over, that torchrun waits for the head's answers once the network is gone.
"$PYTHON" -m torch.distributed.run --nnodes="$NODES" --nproc-per-node="$RANKS" --max-restarts="${MAX_RESTARTS:-2}" \
  --rdzv-backend=c10d --rdzv-endpoint="${HEAD:-localhost:0}" --rdzv-id="${RUN_ID:-kontext_train}" \
  --rdzv-conf="is_host=$IS_HEAD,read_timeout=20" --local-addr="$ADDRESS" -m kontext_train.train "$@" &
torchrun=$!
trap 'kill -TERM "$torchrun" 2>/dev/null' TERM  # torchrun hands it on and waits for the ranks, and this shell for torchrun
trap : INT                                      # Ctrl-C reaches torchrun too
"$PYTHON" "$HERE/end_frozen.py" "$torchrun" "${FROZEN_S:-60}" &  # ends with torchrun
status=0
wait "$torchrun" || status=$?
while kill -0 "$torchrun" 2>/dev/null; do  # a signal ended the wait
  status=0
  wait "$torchrun" || status=$?
done
if [ -e "$KONTEXT_TRAIN_INTERRUPTED" ]; then
  rm -f "$KONTEXT_TRAIN_INTERRUPTED"
  exit 75
fi
exit "$status"
