#!/usr/bin/env bash
# On a machine with a GPU, from a bare checkout: correctness, then the sweeps. Nothing is installed.
#
#   benchmarks/gpu.sh                          the default set, together under 10 minutes
#   benchmarks/gpu.sh decode memory            only these
#
# Stages: device correctness forward backward decode memory overhead report (the default set), flex decode_flex sanitizer
# train_step tune.
# OUT names the folder of the results, PYTHON the interpreter. A stage that fails or runs out of its time is reported at
# the end, with a status that is not 0; the others still run.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}"
out="${OUT:-benchmarks/results/gpu}"
export PYTHONPATH=. HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false CUBLAS_WORKSPACE_CONFIG=:4096:8
mkdir -p "$out"
failed=()

# stage NAME SECONDS COMMAND...: its output goes to the screen and to $out/NAME.txt
stage() {
    local name="$1" limit="$2" start="$SECONDS" status
    shift 2
    echo "== $name"
    timeout "$limit" "$@" 2>&1 | tee "$out/$name.txt"
    status="${PIPESTATUS[0]}"
    [[ $status -eq 0 ]] || failed+=("$name: status $status")
    echo "== $name: $((SECONDS - start)) s, status $status"
}

run_stage() {
    case "$1" in
        device) stage device 60 "$python" -c '
import platform, torch, triton
assert torch.cuda.is_available(), "no CUDA device"
print(torch.cuda.get_device_name(), "python", platform.python_version(), "torch", torch.__version__, "triton", triton.__version__)' ;;
        correctness) stage correctness 180 "$python" -m tests.test_gpu --jobs "$(nproc)" ;;
        forward) stage forward 95 "$python" -m benchmarks.attention --what forward --budget 60 --out "$out/forward.jsonl" ;;
        backward) stage backward 120 "$python" -m benchmarks.attention --what backward both --budget 80 --out "$out/backward.jsonl" ;;
        decode) stage decode 125 "$python" -m benchmarks.decode --budget 85 --out "$out/decode.jsonl" ;;
        memory) stage memory 60 "$python" -m benchmarks.memory --budget 30 --out "$out/memory.jsonl" ;;
        flex) stage flex 560 "$python" -m benchmarks.attention --flex --budget 450 --out "$out/flex.jsonl" ;;
        decode_flex) stage decode_flex 560 "$python" -m benchmarks.decode --flex --budget 450 --out "$out/decode_flex.jsonl" ;;
        report)
            stage report 30 "$python" -m benchmarks.roofline "$out"/*.jsonl
            if "$python" -c 'import matplotlib' 2>/dev/null; then
                stage plot 60 "$python" -m benchmarks.plot --out "$out" "$out"/*.jsonl
            else
                echo "matplotlib is not installed: draw elsewhere, with python -m benchmarks.plot --out FOLDER RESULTS"
            fi ;;
        overhead) stage overhead 60 "$python" -m benchmarks.overhead --device cuda --out "$out/overhead.jsonl" ;;
        train_step) stage train_step 300 "$python" -m benchmarks.train_step --device cuda --steps 20 --out "$out/train_step.jsonl" ;;
        tune) stage tune 560 "$python" -m benchmarks.tune --device cuda --out "$out/tiles.json" ;;
        sanitizer)
            if ! command -v compute-sanitizer >/dev/null; then
                echo "compute-sanitizer is not installed: nothing checked"
                failed+=("sanitizer: not installed")
                return
            fi
            for tool in memcheck racecheck; do
                stage "$tool" 250 compute-sanitizer --tool "$tool" --error-exitcode 9 \
                    "$python" -m tests.test_gpu --bare plain "bank ids" everything decode
            done ;;
        *)
            echo "no stage is named '$1'; see the head of this file" >&2
            failed+=("$1: unknown") ;;
    esac
}

if [[ $# -eq 0 ]]; then
    set -- device correctness forward backward decode memory overhead report
fi
for name in "$@"; do
    run_stage "$name"
done
if [[ ${#failed[@]} -gt 0 ]]; then
    printf 'failed: %s\n' "${failed[@]}"
    exit 1
fi
