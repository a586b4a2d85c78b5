#!/usr/bin/env bash
# Checks fastle on a machine with a CUDA GPU, from the checkout, with the packages that `python3` already has:
# the GPU tests, the tests of the Triton kernels, the quick form of every benchmark, and a short training run with its
# evaluation. The check ends within 9 minutes.
#
#   scripts/gpu_check.sh OUTDIR
#
# OUTDIR receives gpu_check.log (all output; the terminal shows the end of each part's), one JSON for each benchmark,
# and metrics.jsonl and eval-test.json of the run. A part that fails does not stop the others.
# Exit status: 0 all parts passed, 1 a part failed, 2 nothing could be checked.
set -euo pipefail

readonly BUDGET_S=530   # 10 s less than 9 minutes, for starting Python and for killing what does not end by itself
readonly TRAINING_S=120 # what tests and benchmarks must leave for training and evaluation
readonly STEPS=300

if (($# != 1)); then
    echo "usage: scripts/gpu_check.sh OUTDIR" >&2
    exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

if ! gpu=$(python3 -c 'import torch; print(torch.cuda.get_device_name())' 2>&1); then
    echo "error: no CUDA GPU that python3's torch can use: ${gpu##*$'\n'}" >&2
    exit 2
fi

log=$out/gpu_check.log
# results of an earlier check must not look like those of this one
rm -f "$log" "$out"/*_bench.json "$out/metrics.jsonl" "$out/eval-test.json"
: >"$log"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
trap 'exit 130' INT
failed=0
rows=()

# part NAME LIMIT_S RESERVE_S OUTPUT COMMAND…: runs the command for at most LIMIT_S, and leaves RESERVE_S of the budget
part() {
    local name=$1 limit=$2 left=$((BUDGET_S - SECONDS - $3)) output=$4
    local status=0 begin=$SECONDS result=passed printed
    shift 4
    ((limit = left < limit ? left : limit)) || true
    if ((limit <= 0)); then
        result="no time left"
    else
        echo "== $name: $* (at most $limit s)" | tee -a "$log"
        printed=$(wc -l <"$log")
        # --foreground lets ctrl-c reach the command. there is no pipe, because a process that outlives its killed
        # parent would hold the pipe open and the script with it
        timeout --foreground --kill-after=5 "$limit" "$@" >>"$log" 2>&1 || status=$?
        tail -n "+$((printed + 1))" "$log" | tail -n 20
        case $status in
            0) [[ -s $output ]] || result="no output" ;;
            124 | 137) result="timed out" ;;
            *) result="failed ($status)" ;;
        esac
    fi
    [[ $result == passed ]] || failed=1
    [[ -s $output ]] || output=-
    rows+=("$(printf '%-24s %-14s %7d  %s' "$name" "$result" "$((SECONDS - begin))" "$output")")
}

echo "$gpu" | tee -a "$log"

# if this machine lacks a package that one test file needs, the other files must still run
part tests 180 "$TRAINING_S" "$log" python3 -m pytest -m gpu --continue-on-collection-errors -p no:cacheprovider

# these have no gpu mark, because CI runs them in Triton's interpreter
part kernels 90 "$TRAINING_S" "$log" python3 -m pytest tests/kernels -k triton -m "not gpu" -p no:cacheprovider

shopt -s nullglob
for bench in bench/*_bench.py; do
    name=$(basename "$bench" .py)
    part "$name" 55 "$TRAINING_S" "$out/$name.json" python3 "$bench" --quick --json "$out/$name.json"
done

# the checkpoints and grids of the run are not results of the check, so the run stays in a temporary folder
run=$scratch/run
part train 90 30 "$run/metrics.jsonl" \
    python3 -c 'from fastle.commands.train import main; main()' shapes --steps "$STEPS" --run "$run" --device cuda
part eval 30 0 "$run/eval-test.json" python3 -c 'from fastle.commands.main import main; main()' eval "$run"
for file in "$run/metrics.jsonl" "$run/eval-test.json"; do
    if [[ -e $file ]]; then
        cp "$file" "$out/"
    fi
done

{
    echo
    printf '%-24s %-14s %7s  %s\n' part result seconds output
    printf '%s\n' "${rows[@]}"
} | sed "s|$run/|$out/|" | tee -a "$log"
exit "$failed"
