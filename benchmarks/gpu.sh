#!/usr/bin/env bash
# On a machine with a GPU: correctness first, then the benchmarks. OUT names the folder of the results.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}"
out="${OUT:-benchmarks/results/gpu}"
mkdir -p "$out"

"$python" -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"; print(torch.cuda.get_device_name(), torch.__version__)'
status=0
"$python" -m pytest -m gpu -q 2>&1 | tee "$out/pytest.txt" || status=$?
# Exit status 5: no test is marked gpu. Measuring goes on, and says so.
if [[ $status -eq 5 ]]; then
    echo "no test is marked gpu: the benchmarks' own comparison is the only check of correctness"
elif [[ $status -ne 0 ]]; then
    exit "$status"
fi
"$python" -m benchmarks.overhead --device cuda --out "$out/overhead.jsonl" | tee "$out/overhead.txt"
"$python" -m benchmarks.train_step --device cuda --steps 20 --out "$out/train_step.jsonl" | tee "$out/train_step.txt"
