"""PTX that is cut off or malformed: one sentence with the line, no crash."""

import subprocess

import pytest
from conftest import PTXSIM

KERNEL = """.version 8.2
.target sm_90a
.address_size 64
.pragma "a pragma of
two lines";
.visible .entry k(.param .u64 a)
{
  .reg .b32 x;
  .reg .b64 address;
  ld.param.u64 address, [a];
  ld.global.u32 x, [address];
  ret;
}
"""


def listed(path, text):
    path.write_text(text)
    return subprocess.run(
        [str(PTXSIM), "--ptx", str(path), "--list"], capture_output=True, text=True, timeout=600
    )


def test_the_kernel_is_listed(tmp_path):
    done = listed(tmp_path / "k.ptx", KERNEL)
    assert done.returncode == 0 and "1 kernels" in done.stdout, done


# The line after the pragma shows that its own lines are counted.
@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("  .reg .b32 x;\n", "  .reg .b32x x;\n", "line 8: unknown register type .b32x"),
        (KERNEL[KERNEL.index("  ret;") :], "", "line 12: unexpected end of file in a function"),
        (KERNEL[KERNEL.index("two lines") :], "", "line 5: expected ';'"),
        ("x, [address];", "x, address;", "line 11: memory operand expected"),
    ],
    ids=["a type", "a function's end", "a pragma's end", "an address"],
)
def test_a_defect_is_named_with_its_line(tmp_path, old, new, said):
    assert KERNEL.count(old) == 1
    done = listed(tmp_path / "k.ptx", KERNEL.replace(old, new))
    assert done.returncode == 1 and said in done.stdout + done.stderr, done
