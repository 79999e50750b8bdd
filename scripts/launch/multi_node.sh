#!/usr/bin/env bash
# Train on several nodes; the same command on each of them:
#   bash scripts/launch/multi_node.sh HOST[:PORT] NODES PROCESSES_PER_NODE [flags of train_full_sft.py]
# HOST is one of the nodes, the one where they meet. docs/cluster.md says what the nodes must share and what happens when
# one dies or joins. Other flags of torchrun are set as PET_NAME: PET_MAX_RESTARTS=10 bash scripts/launch/multi_node.sh …
set -euo pipefail
usage() {
    echo "error: $1" >&2
    echo "usage: bash scripts/launch/multi_node.sh HOST[:PORT] NODES PROCESSES_PER_NODE [flags of train_full_sft.py]" >&2
    echo "       NODES = 2, or 1:4 for 'from 1 to 4 nodes, which may come and go'; one process per GPU" >&2
    exit 2
}
number='[1-9][0-9]*'
[ $# -ge 3 ] || usage "three words are needed before the flags"
[[ "$1" =~ ^[A-Za-z0-9][A-Za-z0-9._-]*(:$number)?$ ]] || usage "HOST[:PORT] is '$1'"
[[ "$2" =~ ^$number(:$number)?$ && ${2%:*} -le ${2#*:} ]] || usage "NODES is '$2'"
[[ "$3" =~ ^$number$ ]] || usage "PROCESSES_PER_NODE is '$3'"
endpoint=$1 nodes=$2 processes=$3
shift 3

root=$(cd "$(dirname "$0")/../.." && pwd)
cd "$root"
. scripts/environment.sh requirements.txt
cd "$OLDPWD"
share_cores "$processes"
network=$(python "$root/scripts/launch/node_network.py" "${endpoint%:*}")
read -r is_host address interface <<< "$network"
if [ "$interface" != - ]; then export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface}; fi
# The processes get a new store each time the nodes change. With the launchers' store a node that is no longer the first one
# stays with its own (torch 2.13): after a node joined, processes wait for each other in different stores.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# --from_resume 1: when a node joins or leaves, torchrun starts all processes anew, without telling them that it did.
set -- --from_resume 1 "$@"
# Nodes meet under a name made of --save_dir: another job that is given the same HOST:PORT does not join this one. Wrong
# flags end here, before anybody waits for anybody.
save_dir=$(save_dir_of "$root" "$@")
name=sft-$(cksum <<< "$save_dir" | cut -d' ' -f1)
# SIGUSR1 asks the trainer for a checkpoint, see single_node.sh.
trap '' USR1
exec torchrun --nnodes "$nodes" --nproc_per_node "$processes" --max-restarts "${PET_MAX_RESTARTS:-3}" \
    --rdzv-backend c10d --rdzv-endpoint "$endpoint" --rdzv-id "$name" --local-addr "${PET_LOCAL_ADDR:-$address}" \
    --rdzv-conf "is_host=$is_host${PET_RDZV_CONF:+,$PET_RDZV_CONF}" \
    "$root/train_full_sft.py" "$@"
