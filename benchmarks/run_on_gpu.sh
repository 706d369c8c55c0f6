#!/usr/bin/env bash
# Builds, tests and measures on a machine with a GPU, in one command and without a network (docs/guides/gpu.md):
#   benchmarks/run_on_gpu.sh [--dry-run] [STAGE[:SECONDS] ...]
# Results grow in ${SQK_RESULTS:-build/gpu_run}, where a further run continues them, and are packed into ${OUT:-gpu_out}.
# --dry-run (or SQK_REHEARSE=1) does it all on a CPU, on toy shapes, the CUDA kernels in the simulator of PTX.
set -euo pipefail

# name:seconds, in the order in which they run, the most telling first. A new stage is one word here and one function
# stage_<name> below, which prints its short table, sends details through `short`, and returns 77 when there was nothing
# for it to do.
STAGES=(setup:60 info:30 truth:60 build:240 first_light:45 tests:80 gemm:80 probe:20 quantize:35 attention:35 experts:25 tune:40 linear:20
  block:35 model:30 report:20 sanitizer:180)
# What runs where no stage is named: the first call on a machine. A rehearsal goes through all of them.
FIRST=(setup info truth build first_light tests:150 gemm:120 probe report)
# Stages that load the CUDA library.
NEEDS_LIBRARY=" first_light tests gemm quantize attention experts tune linear block model sanitizer "

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
export PYTHONUNBUFFERED=1 PYTHONUTF8=1 PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
# Where compilers and matplotlib keep what they have made.
if [[ ! -w ${HOME:-/nonexistent} ]]; then
  export HOME=$root/build/home
  mkdir -p "$HOME"
fi

rehearsing() { [[ -n ${SQK_REHEARSE:-} ]]; }

# short N COMMAND ...: all of its output into the log, the last N lines to the terminal.
short() {
  local lines=$1
  shift
  "$@" 2>&1 | tee >(cat >&3) | tail -n "$lines"
}

# failures COMMAND ...: all of its output into the log; failures and counts to the terminal, when they happen.
failures() {
  local shown='^(FAILED|ERROR|E  |stopped|not started|[0-9]+ (passed|failed))|CUDA error'
  "$@" 2>&1 | tee >(cat >&3) | { grep --line-buffered -E "$shown" || true; }
}

# shellcheck source=benchmarks/on_gpu/stages.sh
source "$root/benchmarks/on_gpu/stages.sh"

# run_stage NAME SECONDS KEPT: KEPT seconds stay for the stages that follow.
# Runs in the shell that prints: a stage gets a shell of its own, so that it can be stopped with all that it started.
run_stage() {
  local name=$1 limit=$2 status=0 begin=$SECONDS left=$((${SQK_SECONDS:-570} - SECONDS)) word
  if ((limit > left - $3)); then limit=$((left - $3)); fi
  if ((limit < 5)); then limit=$((left < $2 ? left : $2)); fi
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
  printf '%-11s %-26s %4d s\n' "$name" "$word" $((SECONDS - begin)) >>"$out/summary.txt"
  publish # a run that is cut off leaves what it has
}

# kept_after PLACE: what the chosen stages after it keep for themselves, half of their limits; the last one takes the rest.
kept_after() {
  local place kept=0
  for ((place = $1 + 1; place < ${#STAGES[@]}; ++place)); do
    local name=${STAGES[place]%%:*}
    if [[ -v chosen[$name] && $name != sanitizer ]]; then kept=$((kept + chosen[$name] / 2)); fi
  done
  echo "$kept"
}

# hash_of FOLDER|FILE ...: of the sources among them.
hash_of() {
  find "$@" -type f \
    \( -name '*.py' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h' -o -name '*.cpp' -o -name '*.sh' \) -print0 |
    LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum | cut -d' ' -f1
}

# aside WHY: what cannot be continued is kept under another name.
aside() {
  local before
  before=$results.before.$(date +%s)
  mv "$results" "$before"
  mkdir "$results"
  echo "$1: earlier results are in $before" | tee -a "$log"
}

# Of everything that decides whether tests pass and how fast something is.
begin_results() {
  local now
  now=$(hash_of csrc smoothquant_kernels tests benchmarks tools setup.py)
  mkdir -p "$results"
  if [[ -n ${SQK_CONTINUE:-} && ! -f $results/sources ]]; then
    tar -C "$results" -xzf "$SQK_CONTINUE" # of another machine of the same kind
  fi
  if [[ -f $results/sources && $(<"$results/sources") != "$now" ]]; then aside "the sources have changed"; fi
  echo "$now" >"$results/sources"
}

# Results of another GPU, driver or torch are not continued either.
same_machine() {
  rehearsing || [[ ! -f $results/info.json ]] && return
  if ! "$python" -m benchmarks.lib.gpu --same "$results/info.json" | tee -a "$log"; then
    aside "this is another machine"
    hash_of csrc smoothquant_kernels tests benchmarks tools setup.py >"$results/sources"
  fi
}

# What comes back from a borrowed machine may be a few files only: one archive.
publish() {
  tar -C "$results" -czf "$out/results.tar.gz.new" . && mv "$out/results.tar.gz.new" "$out/results.tar.gz"
  if compgen -G "$results/report/*.png" >/dev/null; then cp "$results"/report/*.png "$out"; fi # at most four
}

main() {
  local name seconds stage place by_name=1 words=() names=("${STAGES[@]%%:*}")
  local -A chosen=() usual=() # name -> seconds
  for stage in "${STAGES[@]}"; do usual[${stage%%:*}]=${stage##*:}; done
  while (($#)); do
    case $1 in
    --dry-run) export SQK_REHEARSE=1 ;;
    -h | --help)
      sed -n '2,5s/^# \?//p' "$self"
      echo "Stages: ${names[*]}"
      echo "Without one: ${FIRST[*]}"
      exit 0
      ;;
    *) words+=("$1") ;;
    esac
    shift
  done
  if ((${#words[@]} == 0)); then
    by_name=
    words=("${FIRST[@]}")
    if rehearsing; then words=("${names[@]}"); fi
  fi
  for stage in setup "${words[@]}"; do
    name=${stage%%:*} seconds=${stage#"$name"}
    if [[ " ${names[*]} " != *" $name "* || ! $seconds =~ ^(:[0-9]+)?$ ]]; then
      echo "There is no stage '$stage'; the stages are: ${names[*]}; with :SECONDS, if wanted." >&2
      exit 2
    fi
    chosen[$name]=${seconds#:}
    chosen[$name]=${chosen[$name]:-${usual[$name]}}
  done
  if ! rehearsing && ! "$base_python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "The torch of $base_python sees no CUDA GPU; --dry-run rehearses without one." >&2
    exit 2
  fi
  for name in "${!chosen[@]}"; do
    if ! rehearsing && [[ $NEEDS_LIBRARY == *" $name "* && ! -v chosen[build] ]] && ! library_is_current; then
      echo "the library is not built from these sources yet: build is added"
      chosen[build]=${usual[build]}
    fi
  done
  if ! mkdir -p "$out" "$results" || [[ ! -w $root || ! -w $out || ! -w $results ]]; then
    echo "$root, $out and $results must be writable: copy the tree, or name others (OUT, SQK_RESULTS)." >&2
    exit 2
  fi
  : >"$log"
  if rehearsing; then
    echo "A REHEARSAL WITHOUT A GPU: nothing here was built for, run on or measured on one." >"$out/summary.txt"
  else
    : >"$out/summary.txt"
  fi
  begin_results
  failed=0
  for place in "${!STAGES[@]}"; do
    name=${STAGES[place]%%:*}
    if [[ -v chosen[$name] ]]; then
      SQK_BY_NAME=$by_name run_stage "$name" "${chosen[$name]}" "$(kept_after "$place")"
      if [[ $name == setup ]]; then same_machine; fi
    fi
  done
  echo "== summary ($out; results in $results)"
  cat "$out/summary.txt"
  exit "$failed"
}

if [[ -n ${SQK_RUN_STAGE:-} ]]; then
  if [[ $NEEDS_LIBRARY == *" $SQK_RUN_STAGE "* && $SQK_RUN_STAGE != first_light ]] && ! rehearsing; then leave_out; fi
  "stage_$SQK_RUN_STAGE"
else
  main "$@"
fi
