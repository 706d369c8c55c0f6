#!/usr/bin/env bash
# Builds, tests and measures on a machine with a GPU, in one command and without a network (docs/gpu.md):
#   benchmarks/run_on_gpu.sh [--dry-run] [STAGE[:SECONDS] ...]
# Results grow in ${SQK_RESULTS:-build/gpu_run}, where a further run continues them, and are packed into ${OUT:-gpu_out}.
# --dry-run (or SQK_REHEARSE=1) does it all on a CPU, on toy shapes, the CUDA kernels in a simulator where there is one.
set -euo pipefail

# name:seconds, in the order in which they run, the most telling first; the last one gets what the others leave. A new
# stage is one word here and one function stage_<name> below, which prints its short table, sends details through
# `short`, and returns 77 when there was nothing for it to do.
STAGES=(info:30 build:190 tests:80 gemm:80 quantize:35 tune:40 linear:20 block:35 model:30 report:20 sanitizer:180)

self=$(realpath "${BASH_SOURCE[0]}")
root=$(dirname "$(dirname "$self")")
cd "$root"
base_python=${PYTHON:-python3} # the one that has torch
venv=$(realpath -m "${SQK_VENV:-.venv-gpu}")
python=$venv/bin/python
wheels=$(realpath -m "${SQK_WHEELS:-wheels}")
out=$(realpath -m "${OUT:-gpu_out}")
log=$out/run.log
# Results of a rehearsal are never continued by a run.
results=$(realpath -m "${SQK_RESULTS:-build/gpu_${SQK_REHEARSE:+dry_}run}")
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
  "$python" benchmarks/gpu_state.py --json "$results/info.json"
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

# Whether a stage passed with these sources before; never, where it was asked for by name.
passed_before() {
  if rehearsing || [[ -n ${SQK_BY_NAME:-} ]] || ! grep -qxF "$1" "$results/passed" 2>/dev/null; then return 1; fi
  echo "passed before, with the same sources"
}

# simulated COMMAND ...: Python under the simulator, the CUDA kernels' PTX on CPU tensors; 77 where it is not here.
simulated() {
  "$python" benchmarks/simulated.py --arch sm_90 -- "$@"
}

stage_tests() {
  local status=0 simulation=0 run=(-m pytest -q -p no:cacheprovider --maxfail=30)
  if rehearsing; then
    short 12 "$python" "${run[@]}" tests/kernels --backend cpu -k smoke || status=1
    short 12 simulated "${run[@]}" tests/kernels --backend simulator -k smoke || simulation=$?
    if ((simulation != 0 && simulation != 77)); then status=1; fi
    return "$status"
  fi
  if passed_before tests; then return; fi
  SQK_REQUIRE_LIBRARY=1 short 12 "$python" "${run[@]}" -m "cuda or cuda_build" tests --ignore=tests/kernels || status=1
  short 12 "$python" "${run[@]}" tests/kernels --backend cuda || status=1
  return "$status"
}

# budget SECONDS: what a benchmark may spend before it starts its last case, when start and last case take SECONDS.
budget() {
  local left=$((SQK_STAGE_SECONDS - $1))
  echo $((left > 10 ? left : 10))
}

# benchmark NAME LINES ON_CPU SECONDS [OPTION ...]: bench_NAME.py in either form, its file continued.
benchmark() {
  local name=$1 lines=$2 on_cpu=$3 options
  options=(--device cuda --budget-seconds "$(budget "$4")" "${@:5}")
  if rehearsing; then read -ra options <<<"$on_cpu"; fi
  short "$lines" "$python" "benchmarks/bench_$name.py" "${options[@]}" --resume --json "$results/$name.json"
}

stage_gemm() {
  local status=0
  benchmark gemm 40 "--device cpu" 15 || status=1
  if rehearsing; then
    # Every tile of the real table, checked by the benchmark itself.
    local simulation=0
    short 12 timeout --kill-after=5 "$(budget 20)" "$python" benchmarks/simulated.py -- benchmarks/bench_gemm.py \
      --device cpu --tiles --data random --seconds 0 --json "$results/gemm_simulated.json" || simulation=$?
    case $simulation in
    0 | 77) ;;
    124 | 137) echo "the simulator had no time left (it compiles its library first): run again" ;;
    *) status=1 ;;
    esac
  fi
  if ! rehearsing && command -v "${CXX:-g++}" >/dev/null; then
    # Against what was predicted before; says nothing about whether the run is right.
    short 30 "$python" benchmarks/model.py --compare "$results/gemm.json" || true
  fi
  return "$status"
}

stage_quantize() {
  local most
  most=$(budget 20) # the last case may have to compile
  benchmark quantize 40 "--device cpu --quick" 20 --compile-seconds $((most / 3))
}

stage_linear() { benchmark linear 20 --rehearse 10; }

stage_tune() {
  local options=(--device cpu)
  if ! rehearsing; then options=(--device cuda --budget-seconds "$(budget 15)"); fi
  short 50 "$python" benchmarks/tune.py "${options[@]}" --resume --json "$results/tune.json" \
    --cache "$results/tune_cache.json"
}

# Compiling a baseline takes seconds for each shape: the first one only.
stage_block() { benchmark block 30 "--device cpu --quick" 15 --compile-seconds 8; }

stage_model() { benchmark model 20 "--device cpu --quick" 10; }

# Tables and pictures of what the stages before it have left, also when some failed.
stage_report() {
  short 40 "$python" benchmarks/make_report.py "$results" --out "$results/report"
}

stage_sanitizer() {
  local tool seconds command status=0 program
  program=$(PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin command -v compute-sanitizer || true)
  if passed_before sanitizer; then return; fi
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
  if [[ $word == ok ]]; then echo "$name" >>"$results/passed"; fi
  printf '%-10s %-26s %4d s\n' "$name" "$word" $((SECONDS - begin)) >>"$out/summary.txt"
  publish # a run that is cut off leaves what it has
}

# Of everything that decides whether tests pass and how fast something is.
sources_hash() {
  find csrc smoothquant_kernels tests benchmarks tools setup.py -type f \
    \( -name '*.py' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h' -o -name '*.cpp' -o -name '*.sh' \) -print0 |
    LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum | cut -d' ' -f1
}

# What other sources measured is kept, but not continued.
begin_results() {
  local now
  now=$(sources_hash)
  mkdir -p "$results"
  if [[ -f $results/sources && $(<"$results/sources") != "$now" ]]; then
    local before
    before=$results.before.$(date +%s)
    mv "$results" "$before"
    mkdir "$results"
    echo "the sources have changed: earlier results are in $before" | tee -a "$log"
  fi
  echo "$now" >"$results/sources"
}

# What comes back from a borrowed machine may be a few files only: one archive.
publish() {
  tar -C "$results" -czf "$out/results.tar.gz.new" . && mv "$out/results.tar.gz.new" "$out/results.tar.gz"
  if compgen -G "$results/report/*.png" >/dev/null; then cp "$results"/report/*.png "$out"; fi # at most four
}

main() {
  local name seconds stage names=("${STAGES[@]%%:*}")
  local -A chosen=() # name -> seconds
  while (($#)); do
    case $1 in
    --dry-run) export SQK_REHEARSE=1 ;;
    -h | --help)
      sed -n '2,5s/^# \?//p' "$self"
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
  begin_results
  failed=0
  run_stage setup 60
  for stage in "${STAGES[@]}"; do
    name=${stage%%:*}
    seconds=${chosen[$name]:-${stage##*:}}
    if ((${#chosen[@]} == 0)); then
      run_stage "$name" "$seconds"
    elif [[ -v chosen[$name] ]]; then
      SQK_BY_NAME=1 run_stage "$name" "$seconds"
    fi
  done
  echo "== summary ($out; results in $results)"
  cat "$out/summary.txt"
  exit "$failed"
}

if [[ -n ${SQK_RUN_STAGE:-} ]]; then
  "stage_$SQK_RUN_STAGE"
else
  main "$@"
fi
