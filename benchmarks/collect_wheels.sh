#!/usr/bin/env bash
# Fetches the wheels that run_on_gpu.sh may need on a machine without a network. Run it on a machine that has one:
#   benchmarks/collect_wheels.sh [FOLDER]        (default: wheels)
#   PYTHON_VERSION=3.11 PLATFORM=manylinux_2_17_x86_64 benchmarks/collect_wheels.sh
# The package's own dependencies (torch, transformers, ...) are not among them: the machine has them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=${1:-wheels}
most_mib=${SQK_MOST_MIB:-64} # what a copy of the working tree may weigh, the wheels included

mkdir -p "$folder"
platforms=()
for platform in ${PLATFORM:-manylinux_2_28_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64}; do
  platforms+=(--platform "$platform") # pip matches each exactly
done
"${PYTHON:-python3}" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
  --python-version "${PYTHON_VERSION:-3.12}" --implementation cp "${platforms[@]}" \
  --dest "$folder" --requirement benchmarks/on_gpu/requirements.txt

wheels_kib=$(du -sk "$folder" | cut -f1)
tree_kib=0
if git rev-parse --git-dir >/dev/null 2>&1; then
  tree_kib=$(git ls-files -z --cached --others --exclude-standard | du -ck --files0-from=- | tail -n 1 | cut -f1)
fi
total=$(((wheels_kib + tree_kib + 1023) / 1024))
echo "$(find "$folder" -name '*.whl' | wc -l) wheels, $((wheels_kib / 1024)) MiB; with the working tree $total MiB"
if ((total >= most_mib)); then
  echo "that is more than the $most_mib MiB that may be carried" >&2
  exit 1
fi
