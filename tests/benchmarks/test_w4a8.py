"""The benchmark of 4-bit weights: settings that exist, every row in the file, and the table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import w4a8
from smoothquant_kernels import SmoothQuantConfig

FOUND = {
    "perplexity": 15.25,
    "change_percent": -1.5,
    "change_stderr": 0.25,
    "mean_kl": 0.0625,
    "kl_stderr": 0.001,
    "top1_agreement": 0.875,
}


class Fake:
    """Stands in for `accuracy.Bench`."""

    model = object()

    def row(self, name: str, model: object) -> dict[str, Any]:
        assert model is self.model
        return {"model": name, **FOUND}

    def quantized(self, name: str, **settings: Any) -> dict[str, Any]:
        SmoothQuantConfig(**settings)  # refuses unknown names and values
        return {"model": name, **FOUND}


def test_rows_have_settings_and_reach_the_file(tmp_path: Path) -> None:
    file = tmp_path / "w4a8.json"
    rows = w4a8.measure(Fake(), list(w4a8.ROWS), {"cpu": "a CPU"}, file)
    assert [row["model"] for row in rows] == ["float32", *w4a8.ROWS]
    found = json.loads(file.read_text("utf-8"))
    assert found["facts"] == {"cpu": "a CPU"} and found["rows"] == rows
    formats = {SmoothQuantConfig(**s).format_of("a") for n, s in w4a8.ROWS.items() if "W4A8" in n}
    assert formats == {"w4a8"}


def test_the_table() -> None:
    lines = w4a8.table([{"model": "float32", **FOUND}, {"model": "W8A8", **FOUND, "seconds": 3.4}])
    row = "15.250 | -1.50 ± 0.25 % | 0.0625 ± 0.0010 | 0.875 |"
    assert lines.splitlines()[2:] == [f"| float32 | {row}  |", f"| W8A8 | {row} 3 |"]
