#!/usr/bin/env bash
# Builds, tests and measures on a machine with a GPU, in one command and without a network (docs/gpu.md):
#   benchmarks/run_on_gpu.sh [--dry-run] [STAGE[:SECONDS] ...]
# Results go to ${OUT:-gpu_out}. --dry-run (or SQK_REHEARSE=1) does on a CPU, on toy shapes, what needs no GPU.
set -euo pipefail

# name:seconds, in the order in which they run, the most telling first; the last one gets what the others leave. A new
# stage is one word here and one function stage_<name> below, which prints its short table, sends details through
# `short`, and returns 77 when there was nothing for it to do.
STAGES=(info:30 build:200 tests:100 gemm:90 quantize:50 linear:35 tune:50 sanitizer:180)

self=$(realpath "${BASH_SOURCE[0]}")
root=$(dirname "$(dirname "$self")")
cd "$root"
base_python=${PYTHON:-python3} # the one that has torch
venv=$(realpath -m "${SQK_VENV:-.venv-gpu}")
python=$venv/bin/python
wheels=$(realpath -m "${SQK_WHEELS:-wheels}")
out=$(realpath -m "${OUT:-gpu_out}")
log=$out/run.log
most_files=8 # more may not come back from a borrowed machine
export PYTHONUNBUFFERED=1 PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

rehearsing() { [[ -n ${SQK_REHEARSE:-} ]]; }

# short N COMMAND ...: all of its output into the log, the last N lines to the terminal.
short() {
  local lines=$1
  shift
  "$@" 2>&1 | tee >(cat >&3) | tail -n "$lines"
}

stage_setup() {
  if ! "$python" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)' 2>/dev/null; then
    # Without pip: ensurepip is often missing, and the base has pip.
    "$base_python" -m venv --clear --without-pip --system-site-packages "$venv"
    # A base that is itself a virtual environment is not what --system-site-packages means: name its folders.
    local site
    site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    "$base_python" -c 'import sys
for path in sys.path:
    if path.endswith("-packages"):
        print(f"import site; site.addsitedir({path!r})")' >"$site/base.pth"
  fi
  "$python" -c 'import importlib.util, sys
names = "torch transformers safetensors accelerate typer rich numpy".split()
missing = [name for name in names if importlib.util.find_spec(name) is None]
missing and sys.exit("not installed for {}: {}".format(sys.argv[1], " ".join(missing)))' "$base_python"
  "$python" -m pip --version >/dev/null 2>&1 || short 1 "$python" -m ensurepip

  local wanted requirement missing=0
  mapfile -t wanted < <(grep -v '^#' benchmarks/gpu_requirements.txt)
  if [[ -n ${CUTLASS_PATH:-} || -d third_party/cutlass ]]; then
    mapfile -t wanted < <(printf '%s\n' "${wanted[@]}" | grep -v '^nvidia-cutlass')
  fi
  local install=("$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --find-links "$wheels")
  # What the machine has already is left alone. All at once is quick; one by one says what is missing.
  if ! "${install[@]}" "${wanted[@]}" >&3 2>&1; then
    for requirement in "${wanted[@]}"; do
      if ! "${install[@]}" "$requirement" >&3 2>&1; then
        echo "missing: $requirement (no wheel in $wheels)"
        missing=1
      fi
    done
  fi
  echo "$("$python" --version) in $venv"
  if ((missing)) && ! rehearsing; then return 1; fi
}

stage_info() {
  "$python" benchmarks/gpu_state.py --json "$out/info.json"
}

stage_build() {
  if ! rehearsing; then
    export SMOOTHQUANT_KERNELS_BUILD=${SMOOTHQUANT_KERNELS_BUILD:-cuda}
    if [[ -z ${TORCH_CUDA_ARCH_LIST:-} ]]; then
      TORCH_CUDA_ARCH_LIST=$("$python" -c 'import torch
major, minor = torch.cuda.get_device_capability()
print("9.0a" if (major, minor) == (9, 0) else f"{major}.{minor}" if major < 9 else "8.0+PTX")')
      export TORCH_CUDA_ARCH_LIST
    fi
  fi
  # The words of the build itself, or its refusal.
  PYTHONPATH=tools:$PYTHONPATH "$python" -c 'import os, sys
from build_support import BuildError, make_plan
try:
    print(make_plan(os.environ)[1])
except BuildError as error:
    sys.exit(str(error))'
  if rehearsing; then
    echo "rehearsal: nothing is compiled"
    return
  fi
  local start=$SECONDS
  # Without MAX_JOBS: one compiler per core.
  short 3 "$python" -m pip install --verbose --disable-pip-version-check --no-build-isolation --no-deps --editable .
  echo "built in $((SECONDS - start)) s for $TORCH_CUDA_ARCH_LIST"
  "$python" -c 'import sys
from smoothquant_kernels._extension import extension_status
status = extension_status()
print(status)
sys.exit(not status.available)'
}

stage_tests() {
  local status=0 run=("$python" -m pytest -q -p no:cacheprovider --maxfail=30)
  if ! rehearsing; then
    SQK_REQUIRE_LIBRARY=1 short 12 "${run[@]}" -m "cuda or cuda_build" tests --ignore=tests/kernels || status=1
  fi
  if [[ ! -d tests/kernels ]]; then
    echo "tests/kernels is not here"
    if rehearsing; then return 77; fi
  elif rehearsing; then
    short 12 "${run[@]}" tests/kernels --backend cpu -k smoke || status=1
  else
    short 12 "${run[@]}" tests/kernels --backend cuda || status=1
  fi
  return "$status"
}

# budget SECONDS: what a benchmark may spend before it starts its last case, when start and last case take SECONDS.
budget() {
  local left=$((SQK_STAGE_SECONDS - $1))
  echo $((left > 10 ? left : 10))
}

stage_gemm() {
  local options=(--device cpu)
  if ! rehearsing; then options=(--device cuda --budget-seconds "$(budget 15)"); fi
  short 40 "$python" benchmarks/bench_gemm.py "${options[@]}" --json "$out/gemm.json"
}

stage_quantize() {
  local options=(--device cpu --quick) most
  if ! rehearsing; then
    most=$(budget 25) # the last case may have to compile
    options=(--device cuda --budget-seconds "$most" --compile-seconds $((most / 3)))
  fi
  short 40 "$python" benchmarks/bench_quantize.py "${options[@]}" --json "$out/quantize.json"
}

stage_linear() {
  local options=(--rehearse)
  if ! rehearsing; then options=(--device cuda --budget-seconds "$(budget 15)"); fi
  short 20 "$python" benchmarks/bench_linear.py "${options[@]}" --json "$out/linear.json"
}

stage_tune() {
  local options=(--device cpu)
  if ! rehearsing; then options=(--device cuda --budget-seconds "$(budget 15)"); fi
  # A tune.json that is already there is continued.
  short 50 "$python" benchmarks/tune.py "${options[@]}" --resume --json "$out/tune.json"
}

stage_sanitizer() {
  local tool seconds command status=0 program
  program=$(PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin command -v compute-sanitizer || true)
  # torch's caching allocator hides where a tensor ends.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for tool in memcheck racecheck initcheck synccheck; do
    command=("${program:-compute-sanitizer}" --tool "$tool" --error-exitcode 9 --print-limit 20
      "$python" -m pytest -q -p no:cacheprovider tests/kernels --backend cuda -k smoke)
    if rehearsing; then
      echo "would run: ${command[*]}"
    elif [[ -z $program || ! -d tests/kernels ]]; then
      echo "skipped: compute-sanitizer or tests/kernels is not here"
      return 77
    else
      seconds=$(((SQK_STAGE_SECONDS - SECONDS) / 2)) # a slow tool leaves time for the others
      echo "$tool, at most $seconds s:"
      short 3 timeout --kill-after=5 "$seconds" "${command[@]}" || status=1
    fi
  done
  return "$status"
}

# Runs in the shell that prints: a stage gets a shell of its own, so that it can be stopped with all that it started.
run_stage() {
  local name=$1 limit=$2 status=0 begin=$SECONDS left=$((${SQK_SECONDS:-570} - SECONDS)) word
  limit=$((limit < left ? limit : left))
  if ((limit < 5)); then
    word="not started: no time left"
    failed=1
  else
    echo "== $name (at most $limit s)" | tee -a "$log"
    # shellcheck disable=SC2094  # both only append to the log
    SQK_RUN_STAGE=$name SQK_STAGE_SECONDS=$limit timeout --kill-after=10 "$limit" \
      bash "$self" 3>>"$log" 2>&1 | tee -a "$log" || status=$?
    case $status in
    0) word=ok ;;
    77) word=skipped ;;
    124 | 137)
      word="stopped after $limit s"
      tail -n 8 "$log" # what `short` held back
      ;;
    *) word="failed ($status)" ;;
    esac
    if ((status != 0 && status != 77)); then failed=1; fi
  fi
  printf '%-10s %-26s %4d s\n' "$name" "$word" $((SECONDS - begin)) >>"$out/summary.txt"
}

bundle_if_too_many() {
  local files
  mapfile -t files < <(cd "$out" && find . -maxdepth 1 -type f ! -name summary.txt ! -name more.tar.gz)
  if ((${#files[@]} + 1 > most_files)); then
    (cd "$out" && tar -czf more.tar.gz "${files[@]}" && rm -- "${files[@]}")
    echo "more than $most_files files: all but this one are in more.tar.gz" >>"$out/summary.txt"
  fi
}

main() {
  local name seconds stage names=("${STAGES[@]%%:*}")
  local -A chosen=() # name -> seconds
  while (($#)); do
    case $1 in
    --dry-run) export SQK_REHEARSE=1 ;;
    -h | --help)
      sed -n '2,4s/^# \?//p' "$self"
      echo "Stages: ${names[*]}"
      exit 0
      ;;
    *)
      name=${1%%:*} seconds=${1#"$name"}
      if [[ " ${names[*]} " != *" $name "* || ! $seconds =~ ^(:[0-9]+)?$ ]]; then
        echo "There is no stage '$1'; the stages are: ${names[*]}; with :SECONDS, if wanted." >&2
        exit 2
      fi
      chosen[$name]=${seconds#:}
      ;;
    esac
    shift
  done
  if ! rehearsing && ! "$base_python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "The torch of $base_python sees no CUDA GPU; --dry-run rehearses without one." >&2
    exit 2
  fi
  mkdir -p "$out"
  : >"$log"
  if rehearsing; then
    echo "A REHEARSAL WITHOUT A GPU: nothing here was built for, run on or measured on one." >"$out/summary.txt"
  else
    : >"$out/summary.txt"
  fi
  failed=0
  run_stage setup 60
  for stage in "${STAGES[@]}"; do
    name=${stage%%:*}
    seconds=${chosen[$name]:-${stage##*:}}
    if ((${#chosen[@]} == 0)) || [[ -v chosen[$name] ]]; then run_stage "$name" "$seconds"; fi
  done
  bundle_if_too_many
  echo "== summary ($out)"
  cat "$out/summary.txt"
  exit "$failed"
}

if [[ -n ${SQK_RUN_STAGE:-} ]]; then
  "stage_$SQK_RUN_STAGE"
else
  main "$@"
fi
