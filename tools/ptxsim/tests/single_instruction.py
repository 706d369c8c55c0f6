"""Runs one PTX instruction, or a few, on arrays: one thread an element. Can record what it ran.

With PTXSIM_RECORD=FILE every run appends one line of JSON to FILE: the test, the instruction, the
kernel's text, the launch, the inputs and the simulator's outputs. replay.py runs the lines on a GPU.
PTX for another target than sm_90a is not recorded, as a GPU of that architecture refuses it.
"""

import base64
import ctypes as C
import json
import os

import numpy as np

#: PTX type of an array -> NumPy's. There is no float16 among them: tests look at its bits.
TYPES = {
    "u8": np.uint8,
    "s8": np.int8,
    "u16": np.uint16,
    "s16": np.int16,
    "b16": np.uint16,
    "u32": np.uint32,
    "s32": np.int32,
    "b32": np.uint32,
    "u64": np.uint64,
    "s64": np.int64,
    "b64": np.uint64,
    "f32": np.float32,
    "f64": np.float64,
    "f16": np.uint16,
}
#: Bytes of an element -> type of the register that holds it.
REGISTERS = {1: "b16", 2: "b16", 4: "b32", 8: "b64"}
#: Target -> the oldest PTX version that has it and all instructions of the tests, for old drivers.
VERSIONS = {"sm_90a": "8.2", "sm_100a": "8.6"}
KERNEL = """.version {version}
.target {target}
.address_size 64
{extra}
.visible .entry k({parameters})
{{
  .reg .pred done, p, q, r;
  .reg .b32 idx, n, bx, nt, x0, x1, x2, x3;
  .reg .b64 ad, y0, y1;
  .reg .b16 h0, h1, h2, h3;
  {registers}
  mov.u32 idx, %tid.x; mov.u32 bx, %ctaid.x; mov.u32 nt, %ntid.x; mad.lo.u32 idx, bx, nt, idx;
  ld.param.u32 n, [pn]; setp.ge.u32 done, idx, n;
  @done exit;
  {loads}
  {body}
  {stores}
  ret;
}}
"""


def kernel_text(body, inputs, outputs, target, extra):
    """A kernel whose thread idx loads i0, i1, ... from the inputs, runs `body`, and stores o0, o1, ..."""
    registers, loads, stores = [], [], []
    for k, kind in enumerate([*inputs, *outputs]):
        size = np.dtype(TYPES[kind]).itemsize
        address = f"ld.param.u64 ad, [p{k}]; mad.wide.u32 ad, idx, {size}, ad;"
        if k < len(inputs):
            registers.append(f".reg .{REGISTERS[size]} i{k};")
            loads.append(f"{address} ld.global.{kind} i{k}, [ad];")
        else:
            name = f"o{k - len(inputs)}"
            registers.append(f".reg .{REGISTERS[size]} {name};")
            stores.append(f"{address} st.global.b{8 * size} [ad], {name};")
    parameters = [f".param .u64 p{k}" for k in range(len(registers))] + [".param .u32 pn"]
    return KERNEL.format(
        version=VERSIONS[target],
        target=target,
        extra=extra,
        parameters=", ".join(parameters),
        registers=" ".join(registers),
        loads="\n".join(loads),
        body=body,
        stores="\n".join(stores),
    )


def run(sim, body, ins, outs, n, target="sm_90a", block=None, grid=1, extra="", smem=0):
    """Runs `body` for n elements and returns its outputs, an array or a list of arrays.

    Args:
        sim: the fixture.
        body: PTX that reads the registers i0, i1, ... and writes o0, o1, ...; idx is the element.
        ins: (PTX type, array) of each input.
        outs: PTX types of the outputs.
        target: of the PTX; the simulator runs PTX text of every target.
        extra: PTX in front of the kernel.
        smem: bytes of dynamic shared memory.
    """
    ptx = kernel_text(body, [kind for kind, _ in ins], outs, target, extra)
    inputs = [np.ascontiguousarray(array.astype(TYPES[kind], copy=False)) for kind, array in ins]
    outputs = [np.zeros(n, TYPES[kind]) for kind in outs]
    block = block or min(n, 128)
    grid = (n + block - 1) // block if grid == 1 else grid
    records = "PTXSIM_RECORD" in os.environ and target == "sm_90a"
    given = [array.copy() for array in inputs] if records else []
    values = [C.c_uint64(sim.buf(array).value) for array in inputs + outputs] + [C.c_uint32(n)]
    addresses = (C.c_void_p * len(values))(*[C.cast(C.byref(v), C.c_void_p) for v in values])
    module, function = C.c_void_p(), C.c_void_p()
    assert sim.rt.cuModuleLoadData(C.byref(module), ptx.encode()) == 0, ptx
    assert sim.rt.cuModuleGetFunction(C.byref(function), module, b"k") == 0
    error = sim.rt.cuLaunchKernel(function, grid, 1, 1, block, 1, 1, smem, None, addresses, None)
    assert error == 0, sim.message()
    if records:
        case = {
            "test": os.environ["PYTEST_CURRENT_TEST"].rsplit(" ", 1)[0],
            "instruction": body,
            "ptx": ptx,
            "n": n,
            "grid": grid,
            "block": block,
            "smem": smem,
            "inputs": [packed(kind, a) for (kind, _), a in zip(ins, given, strict=True)],
            "outputs": [packed(kind, a) for kind, a in zip(outs, outputs, strict=True)],
        }
        with open(os.environ["PTXSIM_RECORD"], "a") as record:
            record.write(json.dumps(case) + "\n")
    return outputs[0] if len(outputs) == 1 else outputs


def packed(kind, array):
    """An array as JSON."""
    return {"type": kind, "data": base64.b64encode(array.tobytes()).decode()}


def unpacked(value):
    """The array of `packed`."""
    return np.frombuffer(base64.b64decode(value["data"]), TYPES[value["type"]]).copy()
