"""What is stored: formats (codes to named tensors and back), and the checkpoint formats of others, read exactly."""

from __future__ import annotations

FORMATS: dict[str, str] = {
    "pack-quantized": "aerogel.pack.pack_quantized:PackQuantized",
    "int-quantized": "aerogel.pack.int_quantized:IntQuantized",
    "float-quantized": "aerogel.pack.float_quantized:FloatQuantized",
    "nvfp4-pack-quantized": "aerogel.pack.microscaling:Nvfp4Packed",
    "mxfp4-pack-quantized": "aerogel.pack.microscaling:Mxfp4Packed",
    "mxfp8-quantized": "aerogel.pack.microscaling:Mxfp8",
    "table-packed": "aerogel.pack.table_packed:TablePacked",
    "planes": "aerogel.pack.planes:Planes",
    "affine-packed": "aerogel.pack.affine_packed:AffinePacked",
    "complex-packed": "aerogel.pack.complex_packed:ComplexPacked",
}
"""Format name to a `"module:Name"` string; each is a class that implements `aerogel.pack.format.Format`."""

SOURCES: dict[str, str] = {
    "compressed-tensors": "aerogel.pack.compressed_tensors:CompressedTensors",
    "aerogel": "aerogel.model.native:open_own",
    "gptq": "aerogel.pack.gptq:Gptq",
    "awq": "aerogel.pack.awq:Awq",
    "modelopt": "aerogel.pack.modelopt:ModelOpt",
    "auto-round": "aerogel.pack.auto_round:auto_round",
    "bitnet": "aerogel.pack.bitnet:Bitnet",
    "hqq": "aerogel.pack.hqq:Hqq",
    "mxfp4": "aerogel.pack.gpt_oss:GptOss",
    "entropy": "aerogel.model.entropy:EntropyCoded",
}
"""`quant_method` of a config.json (`entropy` where it has such an entry) to what makes the reader of its checkpoints, an
`aerogel.pack.source.Source`."""
