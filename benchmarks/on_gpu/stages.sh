# The stages of run_on_gpu.sh, which sources this file: one function stage_<name> each, and their helpers.
# shellcheck shell=bash disable=SC2154

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
  mapfile -t wanted < <(grep -v '^#' benchmarks/on_gpu/requirements.txt)
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
  "$python" -m benchmarks.lib.gpu --json "$results/info.json"
}

# The simulator of PTX against the GPU: its own instruction tests, bit for bit. It comes before everything that was only
# simulated so far, and needs no library of this project. Without a GPU its tests skip.
stage_truth() {
  local test=tests/gpu/test_simulator_truth.py
  if [[ ! -f $test ]]; then
    echo "skipped: $test is not here"
    return 77
  fi
  if passed_before truth; then return; fi
  OUT=$results short 12 "$python" -m pytest -q -p no:cacheprovider "$test"
}

stage_build() {
  if ! rehearsing; then
    export SMOOTHQUANT_KERNELS_BUILD=${SMOOTHQUANT_KERNELS_BUILD:-cuda}
    # With the tuner's candidates: one build serves every stage.
    export SMOOTHQUANT_KERNELS_TUNING=${SMOOTHQUANT_KERNELS_TUNING:-1}
    if [[ -z ${TORCH_CUDA_ARCH_LIST:-} ]]; then
      TORCH_CUDA_ARCH_LIST=$("$python" -c 'import torch
major, minor = torch.cuda.get_device_capability()
print("9.0a" if (major, minor) == (9, 0) else f"{major}.{minor}" if major < 9 else "8.0+PTX")')
      export TORCH_CUDA_ARCH_LIST
    fi
  fi
  # The words of the build itself, or its refusal.
  "$python" -c 'import os, sys
from tools.build.plan import BuildError, make_plan
try:
    print(make_plan(os.environ)[1])
except BuildError as error:
    sys.exit(str(error))'
  if rehearsing; then
    rehearse_build
    return
  fi
  local start=$SECONDS capability
  rm -f "$built_from"
  # Beside the library, so that the stage `probe` need not wait for a compiler.
  capability=$("$python" -c 'import torch; print("{}{}".format(*torch.cuda.get_device_capability()))')
  "$python" -m benchmarks.prediction.probe --compile "$capability" >&3 2>&1 &
  # Without MAX_JOBS: one compiler per core.
  short 3 "$python" -m pip install --verbose --disable-pip-version-check --no-build-isolation --no-deps --editable .
  echo "built in $((SECONDS - start)) s for $TORCH_CUDA_ARCH_LIST"
  "$python" -c 'import sys
from smoothquant_kernels.backends.cuda import described_library, extension_status
print(extension_status())
sys.exit(described_library()[1] or 0)'
  mkdir -p "$(dirname "$built_from")"
  hash_of csrc tools setup.py >"$built_from"
}

# The binding, compiled with the headers of the torch that such a machine is known to have; no kernel.
rehearse_build() {
  local status=0
  local torch=${SQK_REHEARSE_TORCH-2.11.0}
  if [[ -z $torch || ! -d tools/binding ]]; then
    echo "rehearsal: nothing is compiled"
    return
  fi
  short 12 "$python" -m tools.binding --torch "$torch" || status=$?
  if ((status == 2)); then return 77; fi # no compiler
  return "$status"
}

# What the library was built from, and whether that is what lies here: a copy of the tree keeps what it does not track.
built_from=build/gpu_built_from
library_is_current() {
  [[ -f $built_from && -f smoothquant_kernels/libsmoothquant_kernels.so && $(<"$built_from") == $(hash_of csrc tools setup.py) ]]
}

# Whether a stage passed with these sources before; never, where it was asked for by name.
passed_before() {
  if rehearsing || [[ -n ${SQK_BY_NAME:-} ]] || ! grep -qxF "$1" "$results/passed" 2>/dev/null; then return 1; fi
  echo "passed before, with the same sources"
}

# simulated_within SECONDS COMMAND ...: Python under the simulator, the CUDA kernels' PTX on CPU tensors; 77 where that is
# not here, or was stopped.
simulated_within() {
  local status=0
  timeout --kill-after=5 "$1" "$python" -m benchmarks.on_gpu.simulated --arch sm_90 -- "${@:2}" || status=$?
  case $status in
  124 | 137)
    echo "the simulator had no time left (it compiles its library first): run again"
    return 77
    ;;
  esac
  return "$status"
}

# Every kernel in a process of its own; what is broken is left out from here on (leave_out).
stage_first_light() {
  local options=(--device cuda --seconds "$((SQK_STAGE_SECONDS - 3))") status=0 simulation=0
  if rehearsing; then options=(--device cpu --jobs 2 --limit 60 --seconds "$((SQK_STAGE_SECONDS - 3))"); fi
  "$python" -m benchmarks.on_gpu.first_light "${options[@]}" --resume --json "$results/first_light.json" || status=1
  if rehearsing; then
    short 12 simulated_within "$(budget 5)" -m benchmarks.on_gpu.first_light --device cpu --limit 120 --jobs 1 \
      --json "$results/first_light_simulated.json" --rows "stream 8x16" "64x64x256 swap" quantize kv_append decode_attention_s8 || simulation=$?
    if ((simulation != 0 && simulation != 77)); then status=1; fi
  fi
  return "$status"
}

# SQK_WITHOUT_TILES for this stage: what its user has named, and what first_light has found to be broken.
leave_out() {
  local found=
  if [[ -f $results/first_light.json ]]; then
    found=$("$python" -m benchmarks.on_gpu.first_light --without "$results/first_light.json" || true)
  fi
  if [[ -n $found ]]; then
    export SQK_WITHOUT_TILES=${SQK_WITHOUT_TILES:+$SQK_WITHOUT_TILES,}$found
    echo "without the tiles $SQK_WITHOUT_TILES"
  fi
}

stage_tests() {
  local status=0 simulation=0
  if rehearsing; then
    failures "$python" -m benchmarks.on_gpu.tests --backend cpu --workers 2 --seconds "$(budget 10)" --only smoke \
      tests/kernels || status=1
    short 12 simulated_within "$(budget 5)" -m pytest -q -p no:cacheprovider --maxfail=30 tests/kernels --backend simulator -k smoke ||
      simulation=$?
    if ((simulation != 0 && simulation != 77)); then status=1; fi
    return "$status"
  fi
  if passed_before tests; then return; fi
  failures "$python" -m benchmarks.on_gpu.tests --seconds "$(budget 5)"
}

# budget SECONDS: what a benchmark may spend before it starts its last case, when start and last case take SECONDS.
budget() {
  local left=$((SQK_STAGE_SECONDS - $1))
  echo $((left > 10 ? left : 10))
}

# benchmark MODULE[:FILE] LINES ON_CPU SECONDS [OPTION ...]: benchmarks/MODULE in either form, its FILE.json continued. A
# new process goes on with the cases that are left after a kernel has broken the CUDA context.
benchmark() {
  local module=${1%%:*} file=${1##*:} lines=$2 on_cpu=$3 options begin=$SECONDS status
  while true; do
    status=0
    options=(--device cuda --budget-seconds "$(budget $(($4 + SECONDS - begin)))")
    if rehearsing; then read -ra options <<<"$on_cpu"; else options+=("${@:5}"); fi
    short "$lines" "$python" -m "benchmarks.$module" "${options[@]}" --resume --json "$results/$file.json" ||
      status=$?
    if ((status != 75 || SQK_STAGE_SECONDS - $4 - (SECONDS - begin) < 10)); then return "$status"; fi
    echo "a new process goes on"
  done
}

stage_gemm() {
  local status=0 simulation=0 options=()
  # Triton compiles each kernel, so it waits for a later call, which measures the most telling cases with it again.
  if [[ ! -f $results/gemm.json ]]; then options=(--baselines fp16 bf16 int_mm fp8 vllm sgl); fi
  benchmark gemm 40 "--device cpu" 15 "${options[@]}" || status=1
  if rehearsing; then
    # Every tile of the real table, checked by the benchmark itself.
    short 12 simulated_within "$(budget 20)" -m benchmarks.gemm \
      --device cpu --tiles --data random --seconds 0 --json "$results/gemm_simulated.json" || simulation=$?
    if ((simulation != 0 && simulation != 77)); then status=1; fi
  fi
  return "$status"
}

# What the predictions assume, measured (probe.cu).
stage_probe() {
  if rehearsing; then
    "$python" -m benchmarks.prediction.probe --compile 90
    return
  fi
  "$python" -m benchmarks.prediction.probe --seconds "$(budget 2)" --json "$results/probe.json"
}

stage_quantize() {
  local most
  most=$(budget 20) # the last case may have to compile
  local working=()
  if [[ -f $results/first_light.json ]]; then
    mapfile -t working < <("$python" -m benchmarks.on_gpu.first_light --producers "$results/first_light.json")
  fi
  benchmark quantize 40 "--device cpu --quick" 20 --compile-seconds $((most / 3)) \
    ${working[@]:+--producers "${working[@]}"}
}

stage_attention() {
  local status=0 simulation=0
  benchmark attention 30 "--device cpu" 10 || status=1
  if rehearsing; then
    short 12 simulated_within "$(budget 10)" -m benchmarks.attention \
      --device cpu --contexts 130 --batches 2 --seconds 0 --json "$results/attention_simulated.json" || simulation=$?
    if ((simulation != 0 && simulation != 77)); then status=1; fi
  fi
  return "$status"
}

stage_experts() {
  local status=0 simulation=0
  benchmark experts 20 "--device cpu" 10 || status=1
  if rehearsing; then
    short 12 simulated_within "$(budget 10)" -m benchmarks.experts \
      --device cpu --seconds 0 --json "$results/experts_simulated.json" || simulation=$?
    if ((simulation != 0 && simulation != 77)); then status=1; fi
  fi
  return "$status"
}

stage_linear() { benchmark linear 20 --rehearse 10; }

stage_tune() {
  local status=0
  benchmark tuner:tune 50 "--device cpu" 15 || status=$?
  if [[ -f $results/tune.json ]]; then
    "$python" -m benchmarks.tuner --report "$results/tune.json" --cache "$results/tune_cache.json" | tail -n 1
  fi
  return "$status"
}

# Compiling a baseline takes seconds for each shape: the first one only.
stage_block() { benchmark block 30 "--device cpu --quick" 15 --compile-seconds 8; }

stage_model() { benchmark model 20 "--device cpu --quick" 10; }

# Tables and pictures of what the stages before it have left, also when some failed; then against what was predicted,
# which says nothing about whether the run is right.
stage_report() {
  local status=0
  short 40 "$python" -m benchmarks.pages.report "$results" --out "$results/report" || status=$?
  if ! rehearsing && [[ -f $results/gemm.json ]] && command -v "${CXX:-g++}" >/dev/null; then
    short 30 "$python" -m benchmarks.prediction --compare "$results/gemm.json" || true
  fi
  return "$status"
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
