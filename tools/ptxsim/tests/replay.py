"""Runs recorded instructions on a GPU and compares its results with the simulator's.

    python replay.py RECORD [--report FILE] [--seconds 20]

RECORD is what single_instruction.py writes. The driver, libcuda.so.1, is the GPU's, or the simulator's
under its launcher. Cases run in a child process, which is replaced after an error or a hang, so that each
costs its own case only. Exit status: 0 where all results agree, 1 where one differs or did not come.
"""

import argparse
import ctypes as C
import datetime
import hashlib
import json
import pathlib
import re
import selectors
import subprocess
import sys

import exactness
import numpy as np
from single_instruction import TYPES, packed, unpacked

SOURCES = pathlib.Path(__file__).resolve().parent.parent / "src"
NO_BINARY_FOR_GPU, INVALID_PTX = 209, 218
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76  # CUdevice_attribute


class CudaError(Exception):
    def __init__(self, call, code):
        super().__init__(f"{call} returned CUDA error {code}")
        self.code = code


class Driver:
    """The first GPU of libcuda.so.1."""

    def __init__(self):
        self.library = C.CDLL("libcuda.so.1")
        self.call("cuInit", 0)
        device, context = C.c_int(), C.c_void_p()
        self.call("cuDeviceGet", C.byref(device), 0)
        self.call("cuDevicePrimaryCtxRetain", C.byref(context), device)
        self.call("cuCtxSetCurrent", context)
        name = C.create_string_buffer(128)
        self.call("cuDeviceGetName", name, len(name), device)
        self.name = name.value.decode()
        self.version = self.number("cuDriverGetVersion")
        major = self.number("cuDeviceGetAttribute", CAPABILITY_MAJOR, device)
        minor = self.number("cuDeviceGetAttribute", CAPABILITY_MINOR, device)
        self.capability = f"{major}{minor}"

    def call(self, function, *arguments):
        code = getattr(self.library, function)(*arguments)
        if code:
            raise CudaError(function, code)

    def number(self, function, *arguments):
        value = C.c_int()
        self.call(function, C.byref(value), *arguments)
        return value.value

    def copy(self, array):
        """An array's copy in the GPU's memory."""
        address = C.c_uint64()
        self.call("cuMemAlloc_v2", C.byref(address), C.c_size_t(max(array.nbytes, 1)))
        self.call(
            "cuMemcpyHtoD_v2", address, C.c_void_p(array.ctypes.data), C.c_size_t(array.nbytes)
        )
        return address

    def target(self, ptx):
        """PTX for this GPU. Only compute capability 9.0 runs PTX for sm_90a."""
        if self.capability == "90":
            return ptx
        return re.sub(r"\.target sm_90a\b", f".target sm_{self.capability}", ptx)

    def run(self, case):
        """The outputs of a recorded case."""
        module, function = C.c_void_p(), C.c_void_p()
        self.call("cuModuleLoadData", C.byref(module), self.target(case["ptx"]).encode() + b"\0")
        self.call("cuModuleGetFunction", C.byref(function), module, b"k")
        outputs = [np.zeros(case["n"], TYPES[value["type"]]) for value in case["outputs"]]
        arrays = [unpacked(value) for value in case["inputs"]] + outputs
        values = [self.copy(array) for array in arrays] + [C.c_uint32(case["n"])]
        addresses = (C.c_void_p * len(values))(*[C.addressof(value) for value in values])
        grid, block = (case["grid"], 1, 1), (case["block"], 1, 1)
        self.call("cuLaunchKernel", function, *grid, *block, case["smem"], None, addresses, None)
        self.call("cuCtxSynchronize")
        for address, array in zip(values[len(case["inputs"]) :], outputs, strict=False):
            self.call(
                "cuMemcpyDtoH_v2", C.c_void_p(array.ctypes.data), address, C.c_size_t(array.nbytes)
            )
        for address in values[:-1]:
            self.call("cuMemFree_v2", address)
        self.call("cuModuleUnload", module)
        return outputs


# ---- the child: runs cases, and says what came of each in a line
def child(cases, first):
    driver = Driver()
    print(
        json.dumps(
            {"name": driver.name, "driver": driver.version, "capability": driver.capability}
        ),
        flush=True,
    )
    for case in cases[first:]:
        try:
            outputs = driver.run(case)
            kinds = [value["type"] for value in case["outputs"]]
            said = {"outputs": [packed(k, a) for k, a in zip(kinds, outputs, strict=True)]}
        except CudaError as error:
            said = {"error": str(error), "code": error.code}
        print(json.dumps(said), flush=True)
        if "error" in said:
            return  # errors of kernels stay with the context


# ---- the parent: replaces the child, and compares
class Child:
    def __init__(self, record, first):
        command = [sys.executable, __file__, str(record), "--child", str(first)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0)
        self.unread = b""
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.process.stdout, selectors.EVENT_READ)

    def line(self, seconds):
        """What the child says next; an error where it says nothing."""
        while b"\n" not in self.unread:
            if not self.selector.select(seconds):
                return {"error": f"no result after {seconds:g} s"}
            part = self.process.stdout.read(1 << 20)
            if not part:
                return {"error": f"the process ended with status {self.process.wait()}"}
            self.unread += part
        text, self.unread = self.unread.split(b"\n", 1)
        return json.loads(text)

    def close(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self.selector.close()


def results(record, count, seconds):
    """What the child said of itself, and of each of `count` cases."""
    device, said = {}, []
    while len(said) < count:
        process = Child(record, len(said))
        device = process.line(60 + seconds)
        while "error" not in device and len(said) < count:
            said.append(process.line(seconds))
            if "error" in said[-1]:
                break
        process.close()
        if "error" in device:
            raise SystemExit(f"the GPU cannot be used: {device['error']}")
    return device, said


def compare(case, said, capability):
    """(list that the case belongs to, sentence or None) for a case and its result."""
    if "error" in said:
        missing = said.get("code") in (NO_BINARY_FOR_GPU, INVALID_PTX) and capability != "90"
        return "not available" if missing else "different", said["error"]
    bound = exactness.bound(case["instruction"])
    for k, (simulated, result) in enumerate(zip(case["outputs"], said["outputs"], strict=True)):
        expected, got = unpacked(simulated), unpacked(result)
        bits = np.dtype(f"u{expected.itemsize}")
        inputs = [unpacked(value) for value in case["inputs"]]
        wrong = expected.view(bits) != got.view(bits)
        wrong &= exactness.specified(case["instruction"], inputs, expected.size)
        if bound is not None:
            wrong &= ~exactness.within(expected, got, bound)
        if wrong.any():
            first = int(np.flatnonzero(wrong)[0])
            given = ", ".join(str(a[first]) for a in inputs if first < a.size)
            return "different", (
                f"o{k}[{first}]: simulator {expected[first]} ({expected.view(bits)[first]:#x}), "
                f"GPU {got[first]} ({got.view(bits)[first]:#x}), inputs {given}; "
                f"{int(wrong.sum())} of {wrong.size} differ"
            )
    if bound is None:
        return "same", None
    apart = [
        largest_difference(unpacked(a), unpacked(b))
        for a, b in zip(case["outputs"], said["outputs"], strict=True)
    ]
    return "approximate", f"within its bound, at most {max(apart):g} ulp apart"


def largest_difference(expected, got):
    """In units in the last place of the expected values, over the finite ones."""
    finite = np.isfinite(expected) & np.isfinite(got)
    wide = expected[finite].astype(np.float64)
    apart = np.abs(got[finite].astype(np.float64) - wide) / exactness.ulp(wide)
    return float(apart.max(initial=0))


def sources_hash():
    """Of the simulator's sources."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.rglob("*")):
        if path.is_file():
            digest.update(path.relative_to(SOURCES).as_posix().encode() + b"\0")
            digest.update(path.read_bytes())
    return digest.hexdigest()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("record", type=pathlib.Path)
    parser.add_argument("--report", type=pathlib.Path)
    parser.add_argument("--seconds", type=float, default=20, help="time limit of a case")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    cases = [json.loads(line) for line in options.record.read_text().splitlines()]
    if options.child is not None:
        child(cases, options.child)
        return 0
    device, said = results(options.record, len(cases), options.seconds)
    lists = {"same": [], "approximate": [], "not available": [], "different": []}
    for case, result in zip(cases, said, strict=True):
        kind, sentence = compare(case, result, device["capability"])
        name = case["test"].rpartition("::")[2]
        instruction = " ".join(case["instruction"].split())
        lists[kind].append(f"{name}: {instruction}: {sentence}")
    for kind in ("approximate", "not available", "different"):
        for text in lists[kind]:
            print(f"{kind}: {text}")
    print(f"{len(cases)} cases on {device['name']}: " + counts(lists))
    if options.report:
        report = {
            "device": device,
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            "cases": len(cases),
            "sources_sha256": sources_hash(),
            "same": len(lists.pop("same")),
            **lists,
        }
        options.report.write_text(json.dumps(report, indent=2) + "\n")
    return 1 if lists["different"] else 0


def counts(lists):
    return ", ".join(f"{len(texts)} {kind}" for kind, texts in lists.items())


if __name__ == "__main__":
    sys.exit(main())
