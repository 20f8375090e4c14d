"""Writes tests/data/safetensors: files made by the Python safetensors library, and what must be read from them.

Run with safetensors 0.8 and torch 2.11: python tests/golden/make_safetensors_golden.py
"""

import hashlib
import json
import struct
from pathlib import Path

import torch
from safetensors.torch import save_file

OUT = Path(__file__).parent.parent / "data" / "safetensors"
NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
         torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}


def raw(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def describe(tensors):
    return {name: {"dtype": NAMES[t.dtype], "shape": list(t.shape), "hex": raw(t).hex()} for name, t in tensors.items()}


def content_hash(tensors):
    """The definition in src/io/checkpoint_index.h."""
    record = b""
    for name in sorted(tensors):
        t = tensors[name]
        for text in (name.encode(), NAMES[t.dtype].encode()):
            record += struct.pack("<Q", len(text)) + text
        record += struct.pack("<Q", t.dim()) + b"".join(struct.pack("<Q", n) for n in t.shape)
        record += hashlib.sha256(raw(t)).digest()
    return hashlib.sha256(record).hexdigest()


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    odd = [0.0, -0.0, 1.0, -2.5, float("inf"), float("-inf"), float("nan"), 65504.0, 1e-7, 3.0e38]
    tensors = {
        "f64": torch.tensor(odd, dtype=torch.float64).reshape(2, 5),
        "f32": torch.tensor(odd).reshape(5, 2),
        "f16": torch.tensor(odd, dtype=torch.float16),
        "bf16": torch.tensor(odd, dtype=torch.bfloat16).reshape(1, 10, 1),
        "i64": torch.tensor([-(2**63), -1, 0, 2**63 - 1]),
        "i32": torch.tensor([-(2**31), 2**31 - 1], dtype=torch.int32),
        "i16": torch.tensor([-(2**15), 7, 2**15 - 1], dtype=torch.int16),
        "i8": torch.tensor([-128, 0, 127], dtype=torch.int8),
        "u8": torch.tensor([[0], [255]], dtype=torch.uint8),
        "bool": torch.tensor([True, False, True]),
        "scalar": torch.tensor(3.25),
        "empty": torch.empty(0, 4, dtype=torch.float16),
        "name with spaces, ünïcode and \"quotes\"": torch.arange(6, dtype=torch.int32).reshape(3, 2),
    }
    # One metadata entry: the library writes several in no fixed order.
    save_file(tensors, OUT / "all_dtypes.safetensors", metadata={"rotunda.format": "golden ü"})

    model = {f"layer.{i}.weight": (torch.arange(12) * (i + 1)).to(torch.bfloat16).reshape(3, 4) for i in range(3)}
    model["bias"] = torch.linspace(-1, 1, 5)
    (OUT / "single").mkdir(exist_ok=True)
    save_file(model, OUT / "single" / "model.safetensors", metadata={"format": "pt"})
    shards = {"model-00001-of-00002.safetensors": ["bias", "layer.0.weight"],
              "model-00002-of-00002.safetensors": ["layer.1.weight", "layer.2.weight"]}
    (OUT / "sharded").mkdir(exist_ok=True)
    for file, names in shards.items():
        save_file({n: model[n] for n in names}, OUT / "sharded" / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": sum(t.nbytes for t in model.values())},
             "weight_map": {n: file for file, names in shards.items() for n in names}}
    (OUT / "sharded" / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    # A header whose length is no multiple of 8, as old writers made them: every tensor lies at an odd address.
    header = b'{"x":{"dtype":"F32","shape":[3],"data_offsets":[0,12]},"y":{"dtype":"I64","shape":[1],"data_offsets":[12,20]}}'
    header += b" " * ((1 - len(header)) % 8)
    misaligned = {"x": torch.tensor([1.5, -2.0, 0.25]), "y": torch.tensor([-5])}
    data = b"".join(raw(t) for t in misaligned.values())
    (OUT / "misaligned.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)

    golden = {"all_dtypes": describe(tensors), "model": describe(model), "misaligned": describe(misaligned),
              "model_content_hash": content_hash(model)}
    (OUT / "golden.json").write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
