"""What an import loads: help needs neither torch nor transformers, and every public name resolves."""

from __future__ import annotations

import subprocess
import sys

import pytest

import smoothquant_kernels


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


HELP = """
import sys
from smoothquant_kernels.cli.app import main
sys.argv[1:] = {arguments}
try:
    main()
except SystemExit as end:
    assert not end.code
print(sorted({{"torch", "transformers", "numpy"}} & set(sys.modules)), file=sys.stderr)
assert not {{"torch", "transformers", "numpy"}} & set(sys.modules)
assert not {{"rich", "smoothquant_kernels.storage.document"}} & set(sys.modules)
"""


def test_help_does_not_load_torch() -> None:
    assert "quantize" in run(HELP.format(arguments=["--help"]))
    assert "power_of_two" in run(HELP.format(arguments=["quantize", "--help"]))


# Windows lacks fcntl. torch imports it where it exists, so it is removed first: only our own import can bring it back.
UNWANTED = """
import sys
if {torch}:
    import torch
sys.modules.pop("fcntl", None)
{statement}
found = {{"typer", "rich", "matplotlib", "transformers", "fcntl"}} & set(sys.modules)
assert not found, found
"""


@pytest.mark.parametrize(
    "statement",
    [
        "import smoothquant_kernels.ops",
        "from smoothquant_kernels import smooth_lm, quantize_model, save_quantized, load_quantized",
        "from smoothquant_kernels import calibrate_model, search_config, make_report",
    ],
)
def test_the_library_does_not_load_the_command_line(statement: str) -> None:
    run(UNWANTED.format(torch=True, statement=statement))


def test_the_package_root_loads_nothing() -> None:
    run(UNWANTED.format(torch=False, statement="import smoothquant_kernels"))


def test_public_names() -> None:
    for name in smoothquant_kernels.__all__:
        assert getattr(smoothquant_kernels, name) is not None
    assert set(smoothquant_kernels.__all__) <= set(dir(smoothquant_kernels))
    assert smoothquant_kernels.reference.__name__ == "smoothquant_kernels.reference"
    with pytest.raises(AttributeError, match="has no attribute 'smooth_ml'"):
        _ = smoothquant_kernels.smooth_ml


def test_the_import_registers_the_ops_if_torch_is_loaded() -> None:
    run("import torch, smoothquant_kernels; torch.ops.smoothquant_kernels.quantize.default")
