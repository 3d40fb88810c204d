"""The number formats that `formats.py`, `formats_speed.py` and `decode_formats.py` measure."""

from __future__ import annotations

from typing import Any

INT4 = {"bits": 4, "group_size": 64}
INT3 = {"bits": 3, "group_size": 72, "symmetric": False}
PLAIN = {"gptaq": False, "gptaq_experts": "error"}
QUARTER = {"gptaq_alpha": 0.25}
SHIFT3 = {"format": "planes", "bits": 3, "group_size": 8, "block_rows": 128, "power_of_two": True, "groups": "updated"}
OUTLIERS = {"outliers": "sensitivity", "outlier_share": 0.005}
SPARSE = {"format": "kmeans", "clip": "fisher", "outliers": "sensitivity", "outlier_share": 0.0045}
FORMATS: dict[str, dict[str, Any]] = {
    "int4 symmetric g64": INT4,
    "nf4 g64": {"format": "nf4", "group_size": 64},
    "int3 zero point g72": INT3,
    "bitmod3 g72": {"format": "bitmod", "bits": 3, "group_size": 72},
    "int4 symmetric g64, 9.9 % rows at 8": {**INT4, "rows": "loss", "row_share": 0.099, "row_bits": 8},
    "int4 symmetric g64, 18.8 % rows at 6": {**INT4, "rows": "loss", "row_share": 0.188, "row_bits": 6},
    "int4 symmetric g64, 2 % rows at 8": {**INT4, "rows": "loss", "row_share": 0.02, "row_bits": 8},
    "int4 symmetric g64, 5 % rows at 6": {**INT4, "rows": "loss", "row_share": 0.05, "row_bits": 6},
    "bitmod3 e4m3 scales g40": {"format": "bitmod", "bits": 3, "group_size": 40, "scale_dtype": "e4m3"},
    "kmeans4 per row": {"format": "kmeans", "bits": 4},
    "kmeans4 per row, fisher": {"format": "kmeans", "bits": 4, "clip": "fisher"},
    "bitmod4 g72": {"format": "bitmod", "bits": 4, "group_size": 72},
    "int4 zero point g72": {"bits": 4, "group_size": 72, "symmetric": False},
    "fp4 e2m1 g64": {"format": "float", "kind": "e2m1", "group_size": 64},
    "nf4 e4m3 scales g32": {"format": "nf4", "group_size": 32, "scale_dtype": "e4m3"},
    "bitmod4 e4m3 scales g40": {"format": "bitmod", "bits": 4, "group_size": 40, "scale_dtype": "e4m3"},
    "int3 symmetric g64": {"bits": 3, "group_size": 64},
    "nf4 g64, 9.9 % rows at 8": {"format": "nf4", "group_size": 64, "rows": "loss", "row_share": 0.099, "row_bits": 8},
    "int3 zero point g72, 10 % rows at 6": {**INT3, "rows": "loss", "row_share": 0.1, "row_bits": 6},
    "int4 symmetric g32": {"bits": 4, "group_size": 32},
    "mxfp4 g32": {"format": "mx"},
    "nvfp4 g16": {"format": "nvfp4"},
    "nvfp4 ue5m3 g16": {"format": "nvfp4", "scale_dtype": "ue5m3"},
    "nvfp4 g32": {"format": "nvfp4", "group_size": 32},
    "fp3 e1m1 g64": {"format": "float", "kind": "e1m1", "group_size": 64},
    "fp3 e2m0 g64": {"format": "float", "kind": "e2m0", "group_size": 64},
    "kmeans3 per row": {"format": "kmeans", "bits": 3},
    "kmeans3 per row, fisher": {"format": "kmeans", "bits": 3, "clip": "fisher"},
    "kmeans4 per row, fisher, rtn": {"method": "rtn", "format": "kmeans", "bits": 4, "clip": "fisher"},
    "kmeans4 per row, rtn": {"method": "rtn", "format": "kmeans", "bits": 4},
    "nf4 g64, rtn": {"method": "rtn", "format": "nf4", "group_size": 64},
    "int4 symmetric g64, rtn": {"method": "rtn", **INT4},
    "int4 symmetric g64, rtn, 9.9 % rows at 8": {"method": "rtn", **INT4, "rows": "loss", "row_share": 0.099, "row_bits": 8},
    "fp5 e2m2 g64": {"format": "float", "kind": "e2m2", "group_size": 64},
    "fp6 e2m3 per channel": {"format": "float", "kind": "e2m3"},
    "mxfp8 g32": {"format": "mx", "kind": "e4m3"},
    "fp8 e4m3 per channel, rtn": {"method": "rtn", "format": "fp8"},
    "fp8 e4m3 128x128, rtn": {"method": "rtn", "format": "fp8", "strategy": "block"},
    "fp8 e5m2 per channel, rtn": {"method": "rtn", "format": "float", "kind": "e5m2"},
    "rf8 per channel, rtn": {"method": "rtn", "format": "rf8"},
    "int4 symmetric adaptive, rtn": {"method": "rtn", **INT4, "granularity": "adaptive"},
    "int4 symmetric g128, 0.5 % outliers": {"bits": 4, "group_size": 128, **OUTLIERS},
    "int4 symmetric g128": {"bits": 4, "group_size": 128},
    "int4 symmetric g64, plain": {**INT4, **PLAIN},
    "ternary g64, a quarter": {"format": "ternary", "group_size": 64, "refit": 4, **QUARTER},
    "bcq3 g128": {"method": "bcq", "bits": 3, "group_size": 128, "offset": "scale"},
    "bipolar4 per channel": {"format": "bipolar", "bits": 4, "group_size": None},
    "fp6 e3m2 per channel": {"format": "float", "kind": "e3m2"},
    "planes1 g64, a quarter": {"format": "planes", "bits": 1, "group_size": 64, "refit": 4, **QUARTER},
    "bitmod4 e4m3 scales g32": {"format": "bitmod", "bits": 4, "group_size": 32, "scale_dtype": "e4m3"},
    "bitmod3 e4m3 scales g32": {"format": "bitmod", "bits": 3, "group_size": 32, "scale_dtype": "e4m3"},
    "shift3 8x128, plain": {**SHIFT3, **PLAIN},
    "nested4 g64": {"method": "nested", "bits": 4, "group_size": 64},
    "planes3 g128": {"format": "planes", "bits": 3, "group_size": 128, "offset": "scale"},
    "shift3 8x128, a quarter": {**SHIFT3, **QUARTER},
    "int8 per channel, rtn": {"method": "rtn", "bits": 8},
    "hqq4 floating zero g64": {"method": "hqq", "format": "affine", "bits": 4, "group_size": 64},
    "hqq4 floating zero g128": {"method": "hqq", "format": "affine", "bits": 4, "group_size": 128},
    "affine4 g128": {"format": "affine", "bits": 4, "group_size": 128},
    "affine1 g64, a quarter": {"format": "affine", "bits": 1, "group_size": 64, "refit": 4, **QUARTER},
    "int4 symmetric g64, rtn, hadamard": {"method": "rtn", **INT4, "transform": "hadamard"},
    "int4 symmetric g64, hadamard": {**INT4, "transform": "hadamard"},
    "mxfp4 g32, hadamard": {"format": "mx", "transform": "hadamard"},
    "complex, rtn": {"method": "rtn", "format": "complex"},
    "int4 per channel, rtn, 1 % outliers": {"method": "rtn", "bits": 4, "outliers": "sigma", "outlier_share": 0.01},
    "kmeans4 per row, fisher, rtn, 0.45 % outliers": {
        "method": "rtn",
        "format": "kmeans",
        "bits": 4,
        "clip": "fisher",
        **SPARSE,
    },
}
"""Name -> keys of the quantize stage. Group sizes put neighbours in the list at the same bits per weight (4.25, 3.25)."""
