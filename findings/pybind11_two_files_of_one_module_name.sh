#!/usr/bin/env bash
# Two files of a pybind11 module, loaded under one name, are one module: the first.
#
# pybind11 3.1.0 against 2.13.6; CPython 3.11, g++ 12.
#
# A program may hold two builds of one extension, such as a plain and a tuning build, and load each by its path with
# importlib.util.spec_from_file_location. CPython tells extensions apart by path and name, and so did pybind11 2.13: two
# module objects, each with its own file's values. pybind11 3.1 keeps the modules that it has made by their full name
# alone. The second load opens the second file, but returns the first file's module object, with the first file's
# functions and values, and without an error; only its `__file__`, the first one, tells. A new name before the last dot
# of the spec's name gives two modules again, because the init function is found by the last part only.
#
# Output seen:
#   pybind11 2.13.6: first 1, second 2, one object: False, second says it is file 2
#   pybind11 3.1.0: first 1, second 1, one object: True, second says it is file 1
#   pybind11 3.1.0, other names before the dot: first 1, second 2
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
cd "$folder"
cat >module.cpp <<'CPP'
#include <pybind11/pybind11.h>
PYBIND11_MODULE(kernels, module) { module.attr("build") = BUILD; }
CPP
cat >load.py <<'PYTHON'
import importlib.util

import pybind11


def load(name, file):
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


version = pybind11.__version__
one, two = load("package.kernels", "1/kernels.so"), load("package.kernels", "2/kernels.so")
says = two.__file__.split("/")[-2]
print(f"pybind11 {version}: first {one.build}, second {two.build}, one object: {one is two}, second says it is file {says}")
expected = (1, 1, True, "1") if version == "3.1.0" else (1, 2, False, "2")
assert (one.build, two.build, one is two, says) == expected
if version == "3.1.0":
    one, two = load("a.kernels", "1/kernels.so"), load("b.kernels", "2/kernels.so")
    print(f"pybind11 {version}, other names before the dot: first {one.build}, second {two.build}")
    assert (one.build, two.build) == (1, 2)
PYTHON
for version in 2.13.6 3.1.0; do
  venv/bin/pip install -q "pybind11==$version"
  includes="$(venv/bin/python -m pybind11 --includes)"
  for build in 1 2; do
    mkdir -p "$build"
    # shellcheck disable=SC2086  # several options
    g++ -std=c++17 -O1 -shared -fPIC -fvisibility=hidden $includes "-DBUILD=$build" module.cpp -o "$build/kernels.so"
  done
  venv/bin/python load.py
done
