"""The defects that test_cpu_kernels.py plants in copies of the CPU kernels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.support.mutants import with_replaced


@dataclass(frozen=True)
class Mutant:
    """A defect, planted in a copy.

    Attributes:
        file: the changed file in csrc/cpu.
        old: text that occurs in it exactly once.
        new: the text that replaces it.
        sources: the stems of the sources that are compiled with the change.
        symptom: what the program prints.
        level: the level that is run; None: all.
        build: the build that shows it.
    """

    file: str
    old: str
    new: str
    sources: tuple[str, ...]
    symptom: str
    level: str | None = None
    build: str = "plain"

    def planted(self, csrc: Path) -> tuple[Path, str]:
        """The changed file under `csrc`, and the text that it gets."""
        path = csrc / "cpu" / self.file
        return path, with_replaced(path, self.old, self.new)


RACE = "data race"
MUTANTS: dict[str, Mutant] = {
    "the excess of shifted activations stays in the sums": Mutant(
        "output.h",
        "read<Words>(sums + i) - read<Words>(excess + i)",
        "read<Words>(sums + i)",
        ("level_avx512_vnni",),
        "gemm_s8 at level avx512_vnni",
        "avx512_vnni",
    ),
    "the same before a gated activation": Mutant(
        "gated.h",
        "read<Words>(sums + i) - read<Words>(excess + i)",
        "read<Words>(sums + i)",
        ("level_avx512_vnni",),
        "gemm_s8_gated at level avx512_vnni",
        "avx512_vnni",
    ),
    "a value that stays NaN leaves its row's scale": Mutant(
        "gated.h",
        "  if (any == 0) return;",
        "  return;",
        ("level_portable",),
        "y_scale at level portable",
        "portable",
    ),
    "gate and up are not rounded": Mutant(
        "gated.h",
        "write(product + i, rounded_to(dtype, v));",
        "write(product + i, v);",
        ("level_avx2",),
        "gemm_s8_gated at level avx2",
        "avx2",
    ),
    "the last channels of a gated row are written as a whole block": Mutant(
        "gated.h",
        "rounded, static_cast<size_t>(rows));",
        "rounded, sizeof rounded);",
        ("level_portable",),
        "AddressSanitizer",
        "portable",
        "address",
    ),
    "tasks mark a row at the same time": Mutant(
        "gated.h",
        "__atomic_store(y_scale, &nan, __ATOMIC_RELAXED);",
        "*y_scale = nan;",
        ("level_portable",),
        RACE,
        "portable",
        "thread",
    ),
    "the same with vectors of 256 bits": Mutant(
        "level_avx_vnni.cpp",
        "_mm256_set1_epi8(static_cast<char>(kX))",
        "_mm256_set1_epi8(static_cast<char>(kX - 1))",
        ("level_avx_vnni",),
        "gemm_s8 at level avx_vnni",
        "avx_vnni",
    ),
    "a single last channel is left out": Mutant(
        "panels.h",
        "if (at < c.depth) {",
        "if (at + 1 < c.depth) {",
        ("level_avx2",),
        "linear_s8 at level avx2",
        "avx2",
    ),
    "the first part of a long k is forgotten": Mutant(
        "panels.h",
        "const bool add = done > 0;",
        "const bool add = false;",
        ("level_portable",),
        "linear_s8 at level portable",
        "portable",
    ),
    "a tile of the weight ends with other channels": Mutant(
        "tiles.h",
        "w + row * stride + at, static_cast<size_t>(k - at)",
        "w + row * stride, static_cast<size_t>(k - at)",
        ("level_amx",),
        "gemm_s8 at level amx",
        "amx",
    ),
    "the last tiles of a block never reach y": Mutant(
        "tile_output.h",
        "    finish();\n    if (streams_) _mm_sfence();",
        "    if (streams_) _mm_sfence();",
        ("level_amx",),
        "level amx",
        "amx",
    ),
    "sums are overwritten before they are read": Mutant(
        "tiles.h",
        "  finisher.finish();\n\n",
        "",
        ("level_amx",),
        "level amx",
        "amx",
    ),
    "half of a group is subtracted the wrong way": Mutant(
        "rows.h",
        "r[i + h] = low - high;",
        "r[i + h] = high - low;",
        ("level_portable",),
        "x_q at level portable",
        "portable",
    ),
    "negative values round elsewhere": Mutant(
        "simd.h",
        "v + 12582912.0f",
        "v + 8388608.0f",
        ("level_avx2",),
        "x_q at level avx2",
        "avx2",
    ),
    "a static scale hides NaN": Mutant(
        "layer.h",
        "if (!is_finite_bits(absmax)) scale = float_of(kNanBits);",
        "",
        ("quantize", "gemm"),
        "x_scale at level portable",
    ),
    "two tasks take the same columns": Mutant(
        "layer.h",
        "return {at(part), at(part + 1)};",
        "return {at(part), at(part + 2 < parts ? part + 2 : parts)};",
        ("quantize", "gemm"),
        RACE,
        "portable",
        "thread",
    ),
    "the sums before a larger score keep their size": Mutant(
        "attend.h",
        "factors[r] = state[0] == most ? 1.0f : exp_of(state[0] - most);",
        "factors[r] = 1.0f;",
        ("level_portable",),
        "decode_attention_s8 at level portable",
        "portable",
    ),
    "a wrong coefficient of exp": Mutant(
        "attend.h",
        "1.0f / 6.0f",
        "1.0f / 7.0f",
        ("level_avx2",),
        "decode_attention_s8 at level avx2",
        "avx2",
    ),
    "the excess of shifted keys stays in the scores": Mutant(
        "scores512.h",
        "_mm512_set1_epi32(-q.excess[first + r])",
        "_mm512_setzero_si512()",
        ("level_avx512_vnni",),
        "decode_attention_s8 at level avx512_vnni",
        "avx512_vnni",
    ),
    "the last tokens of a run are read beyond it": Mutant(
        "scores.h",
        "(t + n < tokens ? t + n : tokens - 1) * width",
        "(t + n) * width",
        ("level_portable",),
        "AddressSanitizer",
        "portable",
        "address",
    ),
    "the parts of a sequence share their sums": Mutant(
        "attention.cpp",
        "states + (pair * division.parts + part) * stride",
        "states + (pair * division.parts + parts.first) * stride",
        ("attention",),
        "decode_attention_s8 at level portable",
        "portable",
    ),
    "the second half of a rotary embedding turns the other way": Mutant(
        "kv_cache.cpp",
        "high * cos.of[i + half] + low * sin.of[i + half]",
        "high * cos.of[i + half] - low * sin.of[i + half]",
        ("kv_cache",),
        "kv_append at level portable",
        "portable",
    ),
    "all tasks share one scratch": Mutant(
        "gemm.cpp",
        "const RowScratch own(scratch + task * division.scratch_bytes, p.k);",
        "const RowScratch own(scratch, p.k);",
        ("gemm",),
        RACE,
        "portable",
        "thread",
    ),
}

W4 = {
    "the offsets of a last group without a partner are lost": Mutant(
        "w4.h",
        "pair < divide_up(groups, int64_t{2})",
        "pair < groups / 2",
        ("level_portable",),
        "gemm_w4a8 at level portable",
        "portable",
    ),
    "channels beyond k count": Mutant(
        "w4.h",
        "int8_t last[kW4Group] = {};",
        "int8_t last[kW4Group]; std::memset(last, 1, sizeof last);",
        ("level_avx2",),
        "linear_w4a8 at level avx2",
        "avx2",
    ),
    "a last group is read as if it were whole": Mutant(
        "w4.h",
        "static_cast<size_t>(k - whole * kW4Group));",
        "sizeof last);",
        ("level_portable",),
        "AddressSanitizer",
        "portable",
        "address",
    ),
    "high halves keep bits of the low ones": Mutant(
        "nibbles256.h",
        "_mm256_and_si256(_mm256_srli_epi16(second, 4), mask)}};",
        "_mm256_srli_epi16(second, 4)}};",
        ("level_avx2",),
        "gemm_w4a8 at level avx2",
        "avx2",
    ),
    "the groups beyond the first 16,384 channels take the steps of the first": Mutant(
        "w4.h",
        "read_groups(p, done, c.groups,",
        "read_groups(p, 0, c.groups,",
        ("level_portable",),
        "w4a8 at level portable",
        "portable",
    ),
    "the two halves of a group are exchanged": Mutant(
        "nibbles512.h",
        "_mm512_set1_epi32(2 * half)",
        "_mm512_set1_epi32(2 * (1 - half))",
        ("level_avx512_vnni",),
        "w4a8 at level avx512_vnni",
        "avx512_vnni",
    ),
    "an unpacked weight keeps its values in the order of the bytes": Mutant(
        "nibbles256.h",
        "put(1, _mm256_unpackhi_epi64(ab, cd));",
        "put(1, _mm256_unpacklo_epi64(ab_end, cd_end));",
        ("level_avx_vnni",),
        "w4a8 at level avx_vnni",
        "avx_vnni",
    ),
    "tiles of an unpacked weight forget the channels before": Mutant(
        "tiles.h",
        "done > 0};",
        "false};",
        ("level_amx",),
        "w4a8 at level amx",
        "amx",
    ),
}
MUTANTS |= W4

EXPERTS = {
    "the bias of the first expert serves all": Mutant(
        "grouped.cpp",
        "p.bias + own.expert * p.n",
        "p.bias",
        ("grouped",),
        "grouped_gemm_s8 at level portable",
        "portable",
    ),
    "experts without rows are counted out": Mutant(
        "grouped.cpp",
        "p.w_q + own.expert * p.w_q_expert_stride",
        "p.w_q + i * p.w_q_expert_stride",
        ("grouped",),
        "grouped_gemm_s8 at level avx2",
        "avx2",
    ),
    "the first rows of an expert are gathered again": Mutant(
        "grouped.cpp",
        "p.rows[first + i]",
        "p.rows[block.first + i]",
        ("grouped",),
        "grouped_gemm_s8 at level portable",
        "portable",
    ),
    "a row that does not exist is read": Mutant(
        "grouped.cpp",
        "std::clamp<int64_t>(p.rows[first + i], 0, p.x_rows - 1)",
        "p.rows[first + i]",
        ("grouped",),
        "AddressSanitizer",
        "portable",
        "address",
    ),
    "rows after all experts keep what was there": Mutant(
        "grouped.cpp",
        "  clear_rows(p, blocks.row(), p.m, stream);",
        "",
        ("grouped",),
        "grouped_gemm_s8 at level portable",
        "portable",
    ),
    "a batch takes a block more than it has memory for": Mutant(
        "grouped.cpp",
        "groups + own > division_.batch_groups",
        "groups > division_.batch_groups",
        ("grouped",),
        "grouped.cpp:",  # the packed rows overwrite the list of blocks first: any report in there
        "portable",
        "address",
    ),
    "every task ends one column early": Mutant(
        "grouped.cpp",
        "block.last_column = column_at(range.end);",
        "block.last_column = column_at(range.end - each);",
        ("grouped",),
        "grouped_gemm_s8 at level portable, 3 threads",
        "portable",
    ),
    "all tasks gather into one scratch": Mutant(
        "grouped.cpp",
        "const RowScratch own(scratch + task * division.scratch_bytes, p.k);",
        "const RowScratch own(scratch, p.k);",
        ("grouped",),
        RACE,
        "portable",
        "thread",
    ),
    "a sum of results starts at +0": Mutant(
        "combine.h",
        "broadcast(-0.0f)",
        "broadcast(0.0f)",
        ("level_avx2",),
        "combine_experts at level avx2",
        "avx2",
    ),
    "a result that does not exist is read": Mutant(
        "combine.h",
        "found < p.y_rows ? found : p.y_rows - 1",
        "found",
        ("level_portable",),
        "AddressSanitizer",
        "portable",
        "address",
    ),
    "the channels beyond the first 1,024 are those before": Mutant(
        "combine.h",
        "load_lanes<kDType>(y, first + i, count)",
        "load_lanes<kDType>(y, i, count)",
        ("level_portable",),
        "combine_experts at level portable",
        "portable",
    ),
}
MUTANTS |= EXPERTS
