#!/usr/bin/env bash
# On a machine with a GPU, from a bare checkout: correctness, then the sweeps. Nothing is installed.
#
#   benchmarks/kernels/gpu.sh                          the default set, together under 10 minutes
#   benchmarks/kernels/gpu.sh decode memory            only these
#
# Stages: device correctness forward backward decode memory overhead dram report (the default set), flex decode_flex
# sanitizer model tune. DEVICE=cpu GRID=quick tries the sweeps on tiny shapes, without a GPU.
# OUT names the folder of the results, PYTHON the interpreter. A stage that fails or runs out of its time is reported at
# the end, with a status that is not 0; the others still run. A stage whose tool is not installed says so and is left out.
set -uo pipefail
shopt -s nullglob
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python="${PYTHON:-python3}"
out="${OUT:-benchmarks/results/gpu}"
sweep=(run --device "${DEVICE:-cuda}" --grid "${GRID:-default}")
slow=(run --device "${DEVICE:-cuda}" --grid "${GRID:-flex}")
export PYTHONPATH=. HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false CUBLAS_WORKSPACE_CONFIG=:4096:8
mkdir -p "$out"
failed=()
left_out=()

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
        device) stage device 20 "$python" -c '
import platform, torch, triton
assert torch.cuda.is_available(), "no CUDA device"
print(torch.cuda.get_device_name(), "python", platform.python_version(), "torch", torch.__version__, "triton", triton.__version__)' ;;
        correctness) stage correctness 160 "$python" -m tests.test_gpu --jobs "$(nproc)" ;;
        forward) stage forward 75 "$python" -m benchmarks "${sweep[@]}" --suite operator --select what=forward --budget 50 --out "$out/forward.json" ;;
        backward) stage backward 90 "$python" -m benchmarks "${sweep[@]}" --suite operator --select what=backward,both,prefix-only --budget 60 --out "$out/backward.json" ;;
        decode) stage decode 95 "$python" -m benchmarks "${sweep[@]}" --suite operator --select what=decode --budget 65 --out "$out/decode.json" ;;
        memory) stage memory 40 "$python" -m benchmarks "${sweep[@]}" --suite memory --select model=None --budget 20 --out "$out/memory.json" ;;
        flex) stage flex 560 "$python" -m benchmarks "${slow[@]}" --suite operator --select what=forward,backward,both --budget 450 --out "$out/flex.json" ;;
        decode_flex) stage decode_flex 560 "$python" -m benchmarks "${slow[@]}" --suite operator --select what=decode --budget 450 --out "$out/decode_flex.json" ;;
        report)
            stage report 20 "$python" -m benchmarks.kernels.roofline "$out"/*.json "$out"/dram/*.json
            if "$python" -c 'import matplotlib' 2>/dev/null; then
                stage plot 25 "$python" -m benchmarks report "$out"/*.json --out "$out/report.md"
            else
                echo "matplotlib is not installed: elsewhere: python -m benchmarks report RESULTS --out report.md"
            fi ;;
        overhead) stage overhead 35 "$python" -m benchmarks "${sweep[@]}" --suite overhead --out "$out/overhead.json" ;;
        model) stage model 560 "$python" -m benchmarks "${sweep[@]}" --suite model --budget 450 --out "$out/model.json" ;;
        dram) stage dram 35 "$python" -m benchmarks.kernels.dram --out "$out/dram/dram.json" ;;
        tune)
            mkdir -p "$out/tune"
            stage tune 560 "$python" -m benchmarks.kernels.tune --device cuda --dtype half --jobs "$(nproc)" \
                --out "$out/tune/tiles.json" ;;
        sanitizer)
            local checker
            checker="$(command -v compute-sanitizer || compgen -G '/usr/local/cuda*/bin/compute-sanitizer' | tail -n 1)"
            if [[ -z $checker ]]; then
                echo "compute-sanitizer is neither on PATH nor in /usr/local/cuda: nothing checked" | tee "$out/sanitizer.txt"
                left_out+=("sanitizer: compute-sanitizer is not installed")
                return
            fi
            for tool in memcheck racecheck; do
                stage "$tool" 250 "$checker" --tool "$tool" --error-exitcode 9 \
                    "$python" -m tests.test_gpu --bare plain "bank ids" everything decode
            done ;;
        *)
            echo "no stage is named '$1'; see the head of this file" >&2
            failed+=("$1: unknown") ;;
    esac
}

if [[ $# -eq 0 ]]; then
    set -- device correctness forward backward decode memory overhead dram report
fi
for name in "$@"; do
    run_stage "$name"
done
if [[ ${#left_out[@]} -gt 0 ]]; then
    printf 'left out: %s\n' "${left_out[@]}"
fi
if [[ ${#failed[@]} -gt 0 ]]; then
    printf 'failed: %s\n' "${failed[@]}"
    exit 1
fi
