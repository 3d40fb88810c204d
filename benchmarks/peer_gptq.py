"""llm-compressor's GPTQ on the same model and token ids, for benchmarks/compress_speed.py. Runs in the peer's environment."""

from __future__ import annotations

import json
import sys
import time

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

model_path, ids_path, rows, length, out = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
ids = load_file(ids_path)["calibration"][:rows, :length].long()
data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
scheme = {
    "group_0": {
        "targets": ["Linear"],
        "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64},
    }
}
modifier = GPTQModifier(config_groups=scheme, ignore=["lm_head"], dampening_frac=0.01)
start, cpu = time.perf_counter(), time.process_time()
oneshot(model=model, dataset=data, recipe=modifier, max_seq_length=length, num_calibration_samples=rows, output_dir=out)
print(json.dumps({"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}))
