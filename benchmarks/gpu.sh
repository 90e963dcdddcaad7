#!/usr/bin/env bash
# Table 1's CIFAR-10 column on one GPU for a while: benchmarks/gpu.sh OUT MINUTES [SEEDS]
# Three processes share the card, a method each, seed after seed; a call after it goes on where the time was up. Records come
# as OUT/records-*.jsonl, for `python -m sidae_lib adopt`; image sets and store: SIDAE_DATA, SIDAE_RUNS. DEVICE, SCALE and
# DATASETS can be set for a rehearsal.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
OUT=$1 MINUTES=$2 SEEDS=${3:-5}
mkdir -p "$OUT"
export TQDM_DISABLE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} PYTHONUNBUFFERED=1

learn() { # learn NAME METHOD...
    local name=$1 began=$SECONDS
    shift
    python3 -m sidae_lib run accuracy_vs_epochs --scale "${SCALE:-paper}" --datasets ${DATASETS:-cifar10} --seeds "$SEEDS" \
        --device "${DEVICE:-cuda}" --methods "$@" --minutes "$MINUTES" --bundle "$OUT/records-$name.jsonl" \
        >>"$OUT/$name.log" 2>&1
    echo "$name: exit $? after $((SECONDS - began)) s"
}

learn sidae sidae &
learn dae dae &
learn simsiam simsiam supervised &
learn untrained untrained &
wait
tail -n 3 "$OUT"/*.log
