#!/usr/bin/env bash
# One GPU for a while: benchmarks/gpu.sh OUT [--minutes N] [--seeds N]
# Within three minutes `check-gpu` and as much of one run of SidAE as fits; then Table 1's CIFAR-10 column in three processes
# that share the card, seed after seed, then what the paper leaves open, until N minutes (15) have passed. OUT gets the records, for
# `python -m sidae_lib adopt`, a log of each part and the times; a further call with the same store goes on and checks no more.
# Image sets and store: SIDAE_DATA, SIDAE_RUNS. For a rehearsal: DEVICE, SCALE, DATASETS, JOBS.
set -uo pipefail
usage="usage: benchmarks/gpu.sh OUT [--minutes N] [--seeds N], N whole"
OUT=${1:?$usage} MINUTES=15 SEEDS=5
shift
while [ $# -gt 0 ]; do
    case "$1 ${2-}" in
        "--minutes "[1-9]*) MINUTES=$2 ;;
        "--seeds "[1-9]*) SEEDS=$2 ;;
        *) echo "$usage" >&2 && exit 2 ;;
    esac
    shift 2
done
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) && cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
export TQDM_DISABLE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} PYTHONUNBUFFERED=1 SIDAE_RUNS=${SIDAE_RUNS:-$PWD/runs}
DEVICE=${DEVICE:-cuda} CHECKED=$SIDAE_RUNS/gpu-checked

within() { # within SECONDS: so many, or what is left of all
    local left=$((60 * MINUTES - SECONDS - 10))
    echo $(($1 < left ? $1 : left))
}

part() { # part NAME SECONDS ARGUMENT...: one call of the library, ended after so many seconds if it has not ended by then
    local name=$1 seconds=$2 began=$SECONDS
    shift 2
    timeout -k 5 "$seconds" python3 -m sidae_lib "$@" --device "$DEVICE" >>"$OUT/$name.log" 2>&1
    echo "$name: exit $? after $((SECONDS - began)) s"
}

learn() { # learn NAME SECONDS FIGURE ARGUMENT...: trains and evaluates, stops at checkpoints half a minute before its end
    local name=$1 seconds=$2 figure=$3 still=$(($2 - 30))
    shift 3
    [ "$still" -lt 15 ] && return
    part "$name" "$seconds" run "$figure" --scale "${SCALE:-paper}" --datasets ${DATASETS:-cifar10} --order seed \
        --bundle "$OUT/records.jsonl" --minutes "$(printf '%d.%02d' $((still / 60)) $((still % 60 * 100 / 60)))" "$@"
}

# Processes share the card by MPS; where it does not work they take turns.
if [ "$DEVICE" != cpu ] && command -v nvidia-cuda-mps-control >/dev/null && ! echo get_server_list | nvidia-cuda-mps-control >/dev/null 2>&1; then
    export CUDA_MPS_PIPE_DIRECTORY=$(mktemp -d) CUDA_MPS_LOG_DIRECTORY=$(mktemp -d)
    nvidia-cuda-mps-control -d && trap 'echo quit | nvidia-cuda-mps-control' EXIT
    if ! timeout 60 python3 -c 'import torch; torch.zeros(1, device="cuda")'; then
        echo "MPS does not work here."
        echo quit | nvidia-cuda-mps-control
        trap - EXIT
        unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
    fi
fi

if [ ! -e "$CHECKED" ]; then
    limit=120 seconds=40
    [ "$DEVICE" = cpu ] && limit=480 seconds=6  # a rehearsal measures nothing and may take its time
    part check "$(within $limit)" check-gpu --seconds $seconds --out "$OUT/step.csv"
    cat "$OUT/check.log"
    [ -e "$OUT/step.csv" ] && mkdir -p "$SIDAE_RUNS" && touch "$CHECKED"
    learn sidae "$(within $((SECONDS < 120 ? 180 - SECONDS : 60)))" accuracy_vs_epochs --seeds 1 --methods sidae
fi
learn seeds "$(within 86400)" accuracy_vs_epochs --seeds "$SEEDS" --jobs "${JOBS:-3}" \
    --methods sidae simsiam dae supervised untrained
learn choices "$(within 86400)" open_choices --jobs "${JOBS:-3}" $([ "${SCALE:-paper}" = paper ] && echo --until 25)
for log in "$OUT"/*.log; do echo "== $log" && tail -n 3 "$log"; done
