"""Quantization: the grids (the only place that rounds) and the solvers that choose codes on them, one method per file."""

from __future__ import annotations

METHODS: dict[str, str] = {
    "rtn": "aerogel.quantize.rtn:RoundToNearest",
    "gptq": "aerogel.quantize.gptq:Gptq",
    "hqq": "aerogel.quantize.hqq:Hqq",
    "bcq": "aerogel.quantize.bcq:Bcq",
    "nested": "aerogel.quantize.nested:Nested",
}
"""Name of a `quantize:` method -> its class, loaded when first used. A method is `Layer -> Layer`."""

SCALES: dict[str, str] = {"awq": "aerogel.quantize.awq:Awq"}
"""Name of a `scale:` method -> its class. A method is `Site -> Site`: it runs before the codes are chosen."""

GRIDS: dict[str, str] = {
    "int": "aerogel.quantize.grids:IntGrid",
    "fp8": "aerogel.quantize.grids:Fp8Grid",
    "float": "aerogel.quantize.formats.floats:Float",
    "nf4": "aerogel.quantize.formats.nf4:Nf4",
    "mx": "aerogel.quantize.formats.mx:Mx",
    "nvfp4": "aerogel.quantize.formats.nvfp4:Nvfp4",
    "bitmod": "aerogel.quantize.formats.bitmod:Bitmod",
    "kmeans": "aerogel.quantize.formats.kmeans:KMeans",
    "rf8": "aerogel.quantize.formats.rf8:Rf8",
    "bipolar": "aerogel.quantize.formats.bipolar:Bipolar",
    "complex": "aerogel.quantize.formats.complex:Complex",
    "ternary": "aerogel.quantize.formats.ternary:Ternary",
    "planes": "aerogel.quantize.planes:PlaneGrid",
    "affine": "aerogel.quantize.formats.affine:Affine",
}
"""`format` of a quantize stage -> the grid it rounds to, a `codes.Grid`."""
