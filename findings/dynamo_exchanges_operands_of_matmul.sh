#!/usr/bin/env bash
# torch.compile turns thing @ tensor into tensor @ thing, where the thing has a __torch_function__.
#
# torch 2.13.0 (CPU), Python 3.11; backend "eager", so nothing but the tracing differs.
#
# A class that is no tensor may define operators and, for functions of torch, `__torch_function__`. In `thing @ tensor`,
# Python asks the object on the left first, so its `__matmul__` runs, and `__torch_function__` does not. Under
# torch.compile(fullgraph=True), `__matmul__` never runs. `__torch_function__` is called instead, with Tensor.matmul and
# (tensor, thing), exactly as for `tensor @ thing`. So it cannot tell the two products apart, and one of them comes out wrong,
# without a graph break or a warning. `*` is treated alike, where the order does no harm; but a class that defers products
# in `__mul__` never sees them. For `-` and `/` the function is Tensor.__rsub__ and Tensor.__rdiv__, which is right.
#
# Output seen:
#   thing * tensor, eager: its own method
#   thing * tensor, compiled: __torch_function__ with (tensor, thing)
#   thing @ tensor, eager: its own method
#   thing @ tensor, compiled: __torch_function__ with (tensor, thing)
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0
cat > run.py <<'PYTHON'
import torch


class Thing:
    def __mul__(self, other):
        return other + 1.0  # 2 for a tensor of ones

    def __matmul__(self, other):
        return other + 1.0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        first_is_tensor = isinstance(args[0], torch.Tensor)
        return args[0] + 2.0 if first_is_tensor else args[1] + 3.0


def product(x):
    return Thing() * x


def matrix_product(x):
    return Thing() @ x


names = {
    2.0: "its own method",
    3.0: "__torch_function__ with (tensor, thing)",
    4.0: "__torch_function__ with (thing, tensor)",
}
for what, f in (("thing * tensor", product), ("thing @ tensor", matrix_product)):
    compiled = torch.compile(f, fullgraph=True, backend="eager")
    for how, g in (("eager", f), ("compiled", compiled)):
        print(f"{what}, {how}: {names[g(torch.ones(1)).item()]}")
PYTHON
venv/bin/python -W ignore run.py | tee seen
diff seen - <<'SEEN' || { echo "this has changed" && exit 1; }
thing * tensor, eager: its own method
thing * tensor, compiled: __torch_function__ with (tensor, thing)
thing @ tensor, eager: its own method
thing @ tensor, compiled: __torch_function__ with (tensor, thing)
SEEN
