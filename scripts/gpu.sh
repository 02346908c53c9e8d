#!/usr/bin/env bash
# The checks that need a GPU: the benchmarks, then the tests of backends, durability and workers on the CuPy backend.
# Needs what requirements/dev.in lists for tests, CuPy and torch, in the environment of $PYTHON; no network.
# TEST_S and BENCH_S: the seconds that the tests and the benchmarks may take. $OUT: the folder of what they write.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
OUT=${OUT:-out/gpu}
mkdir -p "$OUT"
export OPTSERVE_TEST_BACKEND=cupy PYTHONUTF8=1
pytest() { # name, arguments: writes $OUT/name.txt, prints the failures
    local name=$1 status
    shift
    timeout -s INT -k 5 "${TEST_S:-75}" "$PYTHON" -m pytest -q -p no:cacheprovider -o filterwarnings= -o timeout=60 -n "${JOBS:-12}" "$@" >"$OUT/$name.txt" 2>&1
    status=$?
    echo "$name: $(tail -n 1 "$OUT/$name.txt")"
    grep -E '^(FAILED|ERROR)' "$OUT/$name.txt" | cut -c1-200 | head -n 20
    return $status
}
nvidia-smi -L | tee "$OUT/machine.txt"
"$PYTHON" -V | tee -a "$OUT/machine.txt"
failed=0
# First, because tests that are cut off may leave processes behind for some seconds.
timeout "${BENCH_S:-60}" "$PYTHON" -m benchmarks.gpu --json "$OUT/gpu.json" | tee "$OUT/gpu.txt" || failed=1
pytest numerics -k cupy tests/numerics || failed=1
pytest durability tests/durability/test_workers.py tests/durability/test_kill.py tests/durability/test_additions.py \
    tests/durability/test_parameter_steps.py tests/client/test_shared_memory.py tests/client/test_steps.py \
    tests/client/test_wire_dtypes.py tests/client/test_curvature.py tests/service/test_hosted.py \
    tests/service/test_weight_decay_kinds.py tests/service/test_consistencies.py \
    tests/service/test_state_transfer.py || failed=1
cat "$OUT/gpu.txt"
exit $failed
