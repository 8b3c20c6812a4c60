#!/usr/bin/env bash
# On a machine with a GPU, from a bare checkout: correctness, then the sweeps. Nothing is installed.
#
#   benchmarks/kernels/gpu.sh                  the same as first
#   benchmarks/kernels/gpu.sh first            correctness, training and decoding; planned to end within 300 s
#   benchmarks/kernels/gpu.sh second           everything else that is short; planned to end within 300 s
#   benchmarks/kernels/gpu.sh decode memory    only these stages
#
# If correctness fails, look closer instead of running the second set: ONLY="long bank" gpu.sh device sanitizer.
#
# Further stages: cuda forward backward flex decode_flex model tune sanitizer report. cuda is the CUDA C++ kernel: it needs
# nvcc, and writes every primitive's numbers into cuda/primitives.txt, which belongs into tests/data.
# OUT names a folder. One file comes into it, results.tgz, which is written anew after every stage: so it survives when
# the machine is taken away. What it holds already is kept. PYTHON names the interpreter. ONLY limits correctness and
# sanitizer to the checks whose names begin with it. GRID=quick tries everything on tiny shapes.
# A stage that fails or runs out of its time is reported at the end, with a status that is not 0; the others still run,
# unless there is no device. A stage whose tool is not installed says so and is left out.
set -uo pipefail
shopt -s nullglob
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python="${PYTHON:-python3}"
first=(device correctness train decode roofline)
second=(device prefix_only decode_few memory overhead dram memcheck tune_forward roofline)
sweep=(run --device "${DEVICE:-cuda}" --grid "${GRID:-default}")
slow=(run --device "${DEVICE:-cuda}" --grid "${GRID:-flex}")
fewer=()  # rounds
[[ ${GRID:-} != quick ]] || fewer=(--rounds 2)
# The C++ kernels for CPUs are not what is measured here, and building them takes longer than some stages have.
export PREFIX_ATTN_BUILD=0
export PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false CUBLAS_WORKSPACE_CONFIG=:4096:8
out="${OUT:-benchmarks/results/gpu}"
mkdir -p "$out"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
[[ ! -f $out/results.tgz ]] || tar -xzf "$out/results.tgz" -C "$work"
failed=()
left_out=()

pack() {
    tar -czf "$out/results.tgz.partial" -C "$work" . && mv "$out/results.tgz.partial" "$out/results.tgz"
}

# stage NAME SECONDS COMMAND...: its output goes to the screen and to NAME.txt
stage() {
    local name="$1" limit="$2" start="$SECONDS" status
    shift 2
    echo "== $name"
    timeout -k 10 "$limit" "$@" 2>&1 | tee "$work/$name.txt"
    status="${PIPESTATUS[0]}"
    [[ $status -eq 0 ]] || failed+=("$name: status $status")
    echo "== $name: $((SECONDS - start)) s, status $status"
    pack
}

# operator NAME SECONDS BUDGET FILTER...
operator() {
    local name="$1" limit="$2" budget="$3"
    shift 3
    [[ ${GRID:-} != quick ]] || set -- "$1" Hkv=2  # tiny shapes have sizes of their own
    stage "$name" "$limit" "$python" -m benchmarks "${sweep[@]}" --suite operator --select "$@" "${fewer[@]}" --budget "$budget" --out "$work/$name.json"
}

# sanitizer TOOL SECONDS OPTION...: of tests.test_gpu, or of another MODULE
sanitizer() {
    local tool="$1" limit="$2" checker module="${MODULE:-tests.test_gpu}" name="${MODULE:+cuda_}$1"
    shift 2
    checker="$(command -v compute-sanitizer || compgen -G '/usr/local/cuda*/bin/compute-sanitizer' | tail -n 1)"
    if [[ -z $checker ]]; then
        echo "compute-sanitizer is neither on PATH nor in /usr/local/cuda: nothing checked" | tee "$work/$name.txt"
        left_out+=("$name: compute-sanitizer is not installed")
        pack
        return
    fi
    # torch's caching allocator hands out parts of large blocks: an overrun that stays within one would not be seen.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 stage "$name" "$limit" "$checker" --tool "$tool" --error-exitcode 9 \
        "$python" -m "$module" "$@"
}

# The CUDA C++ kernel: built by the first command, minutes; then only what it does.
cuda() {
    local cases=(decode folded wide chunks bank)
    if ! command -v nvcc >/dev/null && [[ -z $(compgen -G '/usr/local/cuda*/bin/nvcc') && ${DEVICE:-cuda} == cuda ]]; then
        echo "nvcc is neither on PATH nor in /usr/local/cuda: nothing built" | tee "$work/cuda.txt"
        left_out+=("cuda: nvcc is not installed")
        return
    fi
    export PREFIX_ATTN_BUILD=1 DEVICE="${DEVICE:-cuda}"
    mkdir -p "$work/cuda"
    [[ ${GRID:-} != quick ]] || cases=(decode)
    stage cuda 420 "$python" -m tests.test_gpu_cuda --device "$DEVICE" --golden "$work/cuda/primitives.txt" \
        --only "${ONLY:-}"
    stage cuda_speed 60 "$python" -m tests.test_gpu_cuda --device "$DEVICE" --speed "$work/cuda/speed.json"
    MODULE=tests.test_gpu_cuda sanitizer memcheck 60 --device "$DEVICE" --bare "${cases[@]}"
    MODULE=tests.test_gpu_cuda sanitizer racecheck 60 --device "$DEVICE" --bare "${cases[@]}"
    export PREFIX_ATTN_BUILD=0
}

run_stage() {
    local only=() checks=(--bare plain "bank ids" everything decode) sizes=(--size 64 --size 128)
    [[ -z ${ONLY:-} ]] || only=(--only "$ONLY") checks=(--only "$ONLY")
    [[ ${GRID:-} != quick ]] || sizes=(--size 64)
    case "$1" in
        device) stage device 20 "$python" -c '
import platform, torch, triton
assert torch.cuda.is_available(), "no CUDA device"
print(torch.cuda.get_device_name(), "python", platform.python_version(), "torch", torch.__version__, "triton", triton.__version__)' ;;
        correctness) stage correctness 140 "$python" -m tests.test_gpu --jobs "$(nproc)" "${only[@]}" ;;
        train) operator train 65 45 what=forward,backward S=8192,1024 Hkv=16 D=64,128 P=128 ;;
        decode) operator decode 60 40 what=decode B=64,256 T=2048,8192,512 P=128,0,512 Hkv=8 D=128 ;;
        roofline) stage roofline 15 "$python" -m benchmarks.kernels.roofline "$work"/*.json "$work"/dram/*.json ;;
        # With the full backward of the same case, whose time is what the target divides by.
        prefix_only) operator prefix_only 30 10 what=prefix-only,backward S=1024 Hkv=16 D=128 P=128 is_causal=True ;;
        decode_few) operator decode_few 50 30 what=decode B=1,8,32,128 Hkv=8 D=128 ;;
        memory) stage memory 35 "$python" -m benchmarks "${sweep[@]}" --suite memory --select model=None --budget 15 --out "$work/memory.json" ;;
        overhead) stage overhead 25 "$python" -m benchmarks "${sweep[@]}" --suite overhead --rounds 10 "${fewer[@]}" --out "$work/overhead.json" ;;
        dram) stage dram 40 "$python" -m benchmarks.kernels.dram --out "$work/dram/dram.json" ;;
        memcheck) sanitizer memcheck 40 --bare decode ;;
        tune_forward)
            mkdir -p "$work/tune"
            stage tune_forward 45 "$python" -m benchmarks.kernels.tune --device cuda --kernel forward --dtype half --plain \
                "${sizes[@]}" --jobs "$(nproc)" --out "$work/tune/forward.json" ;;
        cuda) cuda ;;
        forward) operator forward 75 50 what=forward ;;
        backward) operator backward 90 60 what=backward,both,prefix-only ;;
        flex) stage flex 560 "$python" -m benchmarks "${slow[@]}" --suite operator --select what=forward,backward,both --budget 450 --out "$work/flex.json" ;;
        decode_flex) stage decode_flex 560 "$python" -m benchmarks "${slow[@]}" --suite operator --select what=decode --budget 450 --out "$work/decode_flex.json" ;;
        model) stage model 560 "$python" -m benchmarks "${sweep[@]}" --suite model --budget 450 --out "$work/model.json" ;;
        tune)
            mkdir -p "$work/tune"
            stage tune 560 "$python" -m benchmarks.kernels.tune --device cuda --dtype half --jobs "$(nproc)" \
                --out "$work/tune/tiles.json" ;;
        sanitizer)
            sanitizer memcheck 250 "${checks[@]}"
            sanitizer racecheck 250 "${checks[@]}" ;;
        report)
            if "$python" -c 'import matplotlib' 2>/dev/null; then
                stage report 25 "$python" -m benchmarks report "$work"/*.json --out "$work/report.md"
            else
                echo "matplotlib is not installed: elsewhere: python -m benchmarks report RESULTS --out report.md"
            fi ;;
        *)
            echo "no stage is named '$1'; see the head of this file" >&2
            failed+=("$1: unknown") ;;
    esac
}

stages=()
for name in "${@:-first}"; do
    case "$name" in
        first) stages+=("${first[@]}") ;;
        second) stages+=("${second[@]}") ;;
        *) stages+=("$name") ;;
    esac
done
for name in "${stages[@]}"; do
    run_stage "$name"
    [[ $name != device || ${#failed[@]} -eq 0 ]] || break
done
if [[ ${#left_out[@]} -gt 0 ]]; then
    printf 'left out: %s\n' "${left_out[@]}"
fi
if [[ ${#failed[@]} -gt 0 ]]; then
    printf 'failed: %s\n' "${failed[@]}"
    exit 1
fi
