#!/usr/bin/env bash
# torch.compile multiplies an object by its __torch_function__ where Python calls the object's own __mul__.
#
# torch 2.13.0 (CPU), Python 3.11; backend "eager", so nothing but the tracing differs.
#
# A class that is no tensor may define `__mul__` and, for functions of torch, `__torch_function__`. In `thing * tensor`,
# Python asks the object on the left first, so its `__mul__` runs, and `__torch_function__` does not. Under
# torch.compile(fullgraph=True) the same expression calls `__torch_function__`, with the operands exchanged, and
# `__mul__` never runs. There is no graph break and no warning. So a class whose two methods do not do the same computes
# something else when it is compiled. It is enough that one is left out: a class that defers products in `__mul__` and
# makes tensors of its arguments in `__torch_function__` loses its products.
#
# Output seen:
#   eager: __mul__
#   compiled: __torch_function__ with (tensor, thing)
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

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        first_is_tensor = isinstance(args[0], torch.Tensor)
        return args[0] + 2.0 if first_is_tensor else args[1] + 3.0


def product(x):
    return Thing() * x


names = {
    2.0: "__mul__",
    3.0: "__torch_function__ with (tensor, thing)",
    4.0: "__torch_function__ with (thing, tensor)",
}
for name, f in (("eager", product), ("compiled", torch.compile(product, fullgraph=True, backend="eager"))):
    print(f"{name}: {names[f(torch.ones(1)).item()]}")
PYTHON
venv/bin/python -W ignore run.py | tee seen
diff seen - <<'SEEN' || { echo "this has changed" && exit 1; }
eager: __mul__
compiled: __torch_function__ with (tensor, thing)
SEEN
