#!/usr/bin/env bash
# Everything that needs a Hopper GPU: build or install, tests, compute-sanitizer, demo, benchmarks, ncu. Each step has a
# time limit of its own and leaves its log in OUT, whatever happens to the others. A short table comes last.
#   benchmarks/gpu_suite.sh OUT [--wheel FILE] [build|tests|sanitize|demo|bench|variants|sweeps|ncu ...]  (default: all)
# BENCH_ARGS go to `jax-moe bench`, VARIANT_ARGS to variants.py, SWEEP_ARGS to sweeps.py, TEST_ARGS to pytest,
# SANITIZE_CASES to tests/gpu/sanitize.py, PYTHON names the Python.
set -uo pipefail

(($# >= 1)) || { sed -n '2,6p' "$0"; exit 2; }
mkdir -p "$1"
out="$(cd "$1" && pwd)"
shift
wheel=""
if [[ "${1:-}" == --wheel ]]; then
  (($# >= 2)) || { echo "gpu_suite.sh: --wheel must be followed by a file" >&2; exit 2; }
  wheel="$(realpath "$2")"
  shift 2
fi
steps=("$@")
((${#steps[@]})) || steps=(build tests sanitize demo bench variants sweeps ncu)
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python="${PYTHON:-python3}"
# Words as the shell has them, so that an argument may be quoted.
eval "bench_args=(${BENCH_ARGS:-}) variant_args=(${VARIANT_ARGS:-}) sweep_args=(${SWEEP_ARGS:-})"
eval "test_args=(${TEST_ARGS:-}) cases=(${SANITIZE_CASES:-})"
# JAX would otherwise take most of the GPU's memory at its start, and torch works in the same processes.
export XLA_PYTHON_CLIENT_PREALLOCATE=false PYTHONUNBUFFERED=1
rows=()
failed=0

# attempt NAME SECONDS COMMAND...: runs it with its output in OUT/NAME.log and adds a row to the table.
attempt() {
  local name="$1" limit="$2" start=$SECONDS status=0 verdict detail
  shift 2
  echo "--- $name: $*"
  timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1 || status=$?
  case $status in
    0) verdict=ok ;;
    124 | 137) verdict="over ${limit} s" ;;
    *) verdict="failed ($status)" ;;
  esac
  ((status == 0)) || { failed=1; tail -n 15 "$out/$name.log"; }
  detail="$(grep -v '^[[:space:]]*$' "$out/$name.log" | tail -n 1 | cut -c1-90)"
  rows+=("$(printf '%-20s %-13s %4d s  %s' "$name" "$verdict" $((SECONDS - start)) "$detail")")
}

step_build() {
  if [[ -n "$wheel" ]]; then
    attempt build 120 "$python" -m pip install --no-deps --force-reinstall "$wheel"
  else
    JAX_MOE_CUDA=ON CMAKE_BUILD_PARALLEL_LEVEL="$(nproc)" \
      attempt build 400 "$python" -m pip install --no-build-isolation --no-deps --force-reinstall .
  fi
}

step_tests() { attempt tests 300 "$python" -m pytest -q -rfE --durations=5 -p no:cacheprovider "${test_args[@]}" tests/gpu; }

step_sanitize() {
  local tool
  for tool in memcheck racecheck synccheck initcheck; do
    attempt "sanitize_$tool" 140 compute-sanitizer --tool "$tool" --error-exitcode 1 --print-limit 20 \
      "$python" tests/gpu/sanitize.py "${cases[@]}"
  done
  # One file a step: machines that hand back few files still hand back everything.
  (cd "$out" && tail -n +1 sanitize_*.log >sanitize.log && rm -f sanitize_*.log)
}

step_demo() {
  attempt info 60 "$python" -m jax_moe info
  attempt demo 120 "$python" -m jax_moe demo --device gpu
  (cd "$out" && tail -n +1 info.log demo.log >demo_all.log && rm info.log && mv demo_all.log demo.log)
}

step_bench() {
  attempt bench 560 "$python" -m jax_moe bench --device gpu --json "$out/bench.json" --plot "$out/roofline.png" \
    "${bench_args[@]}"
}

step_variants() {
  attempt variants 300 "$python" benchmarks/variants.py --json "$out/variants.json" "${variant_args[@]}"
}

step_sweeps() {
  attempt sweeps 300 "$python" benchmarks/sweeps.py --json "$out/sweeps.json" "${sweep_args[@]}"
}

# DRAM throughput and tensor pipe of the kernel of both GEMMs, of one small and one large cell; the first call warms up.
step_ncu() {
  local metrics="gpu__time_duration.sum,dram__bytes_read.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed"
  metrics+=",sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed"
  metrics+=",sm__inst_executed_pipe_tensor_op_gmma.avg.pct_of_peak_sustained_active,launch__registers_per_thread"
  local cell
  for cell in "qwen3_30b 16" "qwen3_30b 8192"; do
    # shellcheck disable=SC2086  # the cell is two words
    attempt "ncu_${cell// /_}" 120 ncu --clock-control none --target-processes all -k regex:gemm --launch-skip 1 \
      --launch-count 1 --metrics "$metrics" --csv --page raw "$python" benchmarks/one_call.py $cell
  done
}

for step in "${steps[@]}"; do
  if ! declare -F "step_$step" >/dev/null; then
    echo "gpu_suite.sh: step must be one of build tests sanitize demo bench variants sweeps ncu, got $step" >&2
    exit 2
  fi
done
for step in "${steps[@]}"; do "step_$step"; done

echo
"$python" benchmarks/short_table.py "$out"
printf '%s\n' "${rows[@]}"
exit "$failed"
