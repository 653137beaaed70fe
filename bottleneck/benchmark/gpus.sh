#!/usr/bin/env bash
# What the GPUs of this machine give: a sweep on 1, 2, 4 … of them, one GPU's memory against a 30B backbone, a killed process.
#
#     bottleneck/benchmark/gpus.sh                          tables on the terminal, a CSV each in OUT
#     COUNTS=1,8 PARTS="scale bfloat16 wide" bottleneck/benchmark/gpus.sh      some of it: also gradients sent in 16 bits, and 55 heads
#     SHAPES=tiny BIG=tiny BIG_RANKS=8,64 COUNTS=1,2 ARGS="--batch 2 --micro-batch 2 --block 64" bottleneck/benchmark/gpus.sh      a trial without a GPU
#
# From the environment: COUNTS (numbers of GPUs, default powers of two up to all), PARTS (of scale, bfloat16, wide, killed, fsdp,
# deepspeed_zero3; default "scale bfloat16 killed fsdp deepspeed_zero3"), SHAPES, BIG (spread over the most GPUs of COUNTS),
# BIG_RANKS, ARGS (options of `python -m bottleneck.benchmark scale`), LIMIT (seconds of one command, default 600), OUT (default
# outputs/gpus), PYTHON (default .venv/bin/python). What fails does not stop the rest; the exit code tells.
set -uo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
out=${OUT:-outputs/gpus}
gpus=$({ nvidia-smi -L 2>/dev/null || true; } | wc -l)
counts=${COUNTS:-$(n=1; while [ $n -le $((gpus ? gpus : 2)) ]; do echo -n "$n "; n=$((2 * n)); done | sed 's/ $//; s/ /,/g')}
most=${counts##*,}
big=${BIG:-neox-30b}
failed=0
mkdir -p "$out"
nvidia-smi topo -m 2>/dev/null | tee "$out/topology.txt" || true

one() { # one NAME BENCHMARK OPTIONS…: a benchmark, its table and its CSV
    local name=$1
    shift
    echo "== $name: benchmark $*" >&2
    # shellcheck disable=SC2086
    timeout --signal=INT --kill-after=120 "${LIMIT:-600}" "$python" -m bottleneck.benchmark "$@" ${ARGS:-} --csv "$out/$name.csv" 2> "$out/$name.log" ||
        { failed=1; tail -n 3 "$out/$name.log" >&2; }
}

for part in ${PARTS:-scale bfloat16 killed fsdp deepspeed_zero3}; do
    for shape in ${SHAPES:-pythia-1b pythia-160m}; do
        case $part in
            scale) one "$shape" scale --shape "$shape" --processes "$counts" ;;
            bfloat16) one "$shape-$part" scale --shape "$shape" --processes "$most" trainer.reduce_dtype=bfloat16 ;;
            wide) one "$shape-$part" scale --shape "$shape" --processes "$most" --rates 5 --steps 12 ;;
        esac
    done
    case $part in
        killed) one killed killed --shape "$shape" --processes "$most" ;;
        fsdp | deepspeed_zero3) [ "$most" -gt 1 ] || { echo "== $part: left out, it needs two GPUs" >&2; continue; }
            one "$big-$part" scale --shape "$big" --processes "$most" --ranks "${BIG_RANKS:-64,512,2048}" --steps 4 --batch 32 "trainer=$part" ;;
    esac
done
exit $failed
