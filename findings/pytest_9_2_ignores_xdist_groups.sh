#!/usr/bin/env bash
# With pytest 9.2, pytest-xdist's --dist loadgroup groups nothing, and says nothing.
#
# pytest 9.2.0 against 9.1.1, pytest-xdist 3.8.0; CPython 3.11.
#
# Tests with one xdist_group mark share a worker, so that what they need (a loaded model, a compiled library) is made
# once. pytest-xdist says so by writing "@name" into an item's private field for its id. pytest 9.2 keeps the id elsewhere
# and never reads that field, so the write succeeds, no test has a group, and the marked tests are dealt out as under
# --dist load. All tests pass. What a group was for is made once in each worker, in memory and time, and tests that may
# not run at the same time do.
#
# Output seen:
#   pytest 9.1.1: 12 tests of one group ran in 1 worker, 12 ids name the group
#   pytest 9.2.0: 12 tests of one group ran in 2 workers, 0 ids name the group
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
cd "$folder"
cat >test_group.py <<'PYTHON'
import time

import pytest


@pytest.mark.xdist_group("one")
@pytest.mark.parametrize("i", range(12))
def test_of_the_group(i):
    time.sleep(0.1)  # both workers are ready before the tests are over
PYTHON
for version in 9.1.1 9.2.0; do
  venv/bin/pip install -q "pytest==$version" pytest-xdist==3.8.0
  venv/bin/python -m pytest -vv -n 2 --dist loadgroup -p no:cacheprovider test_group.py | grep '^\[gw' >lines
  workers="$(cut -d ' ' -f 1 lines | sort -u | wc -l)"
  tests="$(wc -l <lines)"
  grouped="$(grep -c '@one' lines || true)"
  [ "$workers" = 1 ] && noun=worker || noun=workers
  echo "pytest $version: $tests tests of one group ran in $workers $noun, $grouped ids name the group"
  [ "$version" = 9.1.1 ] && expected='12 1 12' || expected='12 2 0'
  [ "$tests $workers $grouped" = "$expected" ]
done
