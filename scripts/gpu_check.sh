#!/usr/bin/env bash
# Checks fastle on a machine with a CUDA GPU, from the checkout, with the packages that `python3` already has: first the
# step's figures, then SIGReg's, the GPU tests, a short training with its evaluation, and what else there is time for.
# The check ends within 9 minutes.
#
#   scripts/gpu_check.sh [--rehearse] OUTDIR [PART…]
#
# PART… are some of: step sigreg tests train kernels views loader; by default all, in this order.
# OUTDIR receives gpu_check.log (all output; the terminal shows the end of each part's), summary.txt (after each part),
# a JSON for each benchmark and for each side of the step's, and metrics.jsonl and eval-test.json of the training.
# A part that fails does not stop the others.
# --rehearse goes through the same parts on a CPU, with the smallest sizes and three times their time; its figures mean
# nothing.
# Exit status: 0 all parts passed, 1 a part failed, 2 nothing could be checked.
set -euo pipefail

readonly BUDGET_S=525 # 15 s less than 9 minutes: 10 to kill what does not end by itself, the rest to start Python
readonly PARTS=(step sigreg tests train kernels views loader)

usage() {
    echo "usage: scripts/gpu_check.sh [--rehearse] OUTDIR [${PARTS[*]}]" >&2
    exit 2
}

rehearse=false slower=1
if [[ ${1:-} == --rehearse ]]; then
    rehearse=true slower=3
    shift
fi
(($# >= 1)) && [[ $1 != -* ]] || usage
mkdir -p "$1"
out=$(cd "$1" && pwd)
shift
wanted=("${@:-${PARTS[@]}}")
for part in "${wanted[@]}"; do
    [[ " ${PARTS[*]} " == *" $part "* ]] || usage
done
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

if $rehearse; then
    machine="a rehearsal on a CPU: its figures mean nothing"
    device=cpu step_shape=cifar10:4 sides=("fastle eager")
    sigreg=(--quick --shapes 64x8x16) views=(--quick --shapes crop:1x2x1x32x32:8)
    loader=(--quick --images 128 --sides pil-0)
    gpu_tests=(tests/kernels/test_sigreg_launch.py) kernel_tests=(tests/kernels/test_sigreg_launch.py -k grid)
    training=(--steps 2 --batch-size 4 --hidden 8 --map-channels 8 --slices 8)
elif machine=$(python3 -c 'import torch; print(torch.cuda.get_device_name())' 2>&1); then
    # the captured step is the product, and the others are what it is compared with
    device=cuda step_shape=celeba-masked-512-tuned:128
    sides=("fastle captured bf16" "plain compiled bf16" "plain captured bf16" "fastle eager bf16")
    sigreg=(--quick) views=(--quick) loader=(--quick)
    # if this machine lacks a package that one test file needs, the other files must still run
    gpu_tests=(-v -m gpu --continue-on-collection-errors)
    # these have no gpu mark, because CI runs them in Triton's interpreter
    kernel_tests=(tests/kernels -v -k triton -m "not gpu")
    training=(--steps 300)
else
    echo "error: no CUDA GPU that python3's torch can use: ${machine##*$'\n'}; --rehearse needs none" >&2
    exit 2
fi
if ! $rehearse && python3 -c 'import xdist' 2>/dev/null; then
    gpu_tests+=(-n 8) kernel_tests+=(-n 8)
fi

log=$out/gpu_check.log
# results of an earlier check must not look like those of this one
rm -f "$log" "$out"/*_bench*.json "$out/metrics.jsonl" "$out/eval-test.json" "$out/summary.txt"
: >"$log"
scratch=$(mktemp -d)
run=$scratch/run
failed=0
rows=()

summary() {
    printf '%-24s %-14s %7s  %s\n' part result seconds output
    ((${#rows[@]} == 0)) || printf '%s\n' "${rows[@]}"
}

# the summary comes last, however the check ends
finish() {
    {
        echo
        summary
    } | tee -a "$log"
    rm -rf "$scratch"
}
trap finish EXIT
trap 'exit 130' INT TERM

# part NAME LIMIT_S OUTPUT COMMAND…: runs the command for at most LIMIT_S, and not beyond the budget
part() {
    local name=$1 limit=$(($2 * slower)) left=$((BUDGET_S - SECONDS)) output=$3
    local status=0 begin=$SECONDS result=passed printed
    shift 3
    ((limit = left < limit ? left : limit)) || true
    if ((limit <= 0)); then
        result="no time left"
    else
        echo "== $name: $* (at most $limit s)" | tee -a "$log"
        printed=$(wc -l <"$log")
        # --foreground lets ctrl-c reach the command. there is no pipe, because a process that outlives its killed
        # parent would hold the pipe open and the script with it
        # pytest reports the failures until then when it is interrupted, and not when it is terminated
        timeout --foreground --signal=INT --kill-after=10 "$limit" "$@" >>"$log" 2>&1 || status=$?
        tail -n "+$((printed + 1))" "$log" | tail -n 20
        case $status in
            0) [[ -s $output ]] || result="no output" ;;
            124 | 137) result="timed out" ;;
            *) result="failed ($status)" ;;
        esac
    fi
    [[ $result == passed ]] || failed=1
    # the checkpoints and grids of the run are no results of the check, so the run stays in a temporary folder
    if [[ -s $output && $output == "$run"/* ]]; then
        cp "$output" "$out/"
        output=$out/${output##*/}
    fi
    [[ -s $output ]] || output=-
    rows+=("$(printf '%-24s %-14s %7d  %s' "$name" "$result" "$((SECONDS - begin))" "$output")")
    summary >"$out/summary.txt"
}

bench() {
    local name=$1 limit=$2 json=$3
    shift 3
    part "$name" "$limit" "$out/$json.json" python3 "bench/$name.py" --device "$device" --json "$out/$json.json" "$@"
}

echo "$machine" | tee -a "$log"
for name in "${PARTS[@]}"; do
    [[ " ${wanted[*]} " == *" $name "* ]] || continue
    case $name in
        step)
            # a report for each side: what is measured is kept, whatever comes of the next
            for side in "${sides[@]}"; do
                bench step_bench 130 "step_bench-${side// /-}" --quick --shapes "$step_shape" --sides plain "$side"
            done
            ;;
        sigreg) bench sigreg_bench 95 sigreg_bench "${sigreg[@]}" ;;
        tests) part tests 120 "$log" python3 -m pytest -p no:cacheprovider "${gpu_tests[@]}" ;;
        train)
            part train 75 "$run/metrics.jsonl" python3 -c 'from fastle.commands.train import main; main()' \
                shapes --run "$run" --device "$device" "${training[@]}"
            part eval 30 "$run/eval-test.json" \
                python3 -c 'from fastle.commands.main import main; main()' eval "$run" --device "$device"
            ;;
        kernels) part kernels 90 "$log" python3 -m pytest -p no:cacheprovider "${kernel_tests[@]}" ;;
        views) bench views_bench 60 views_bench "${views[@]}" ;;
        loader) bench loader_bench 60 loader_bench "${loader[@]}" ;;
    esac
done
exit "$failed"
