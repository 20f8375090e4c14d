#!/usr/bin/env python3
"""Makes a LLaMA checkpoint of any shape with random weights, for measurements of speed and memory. Its text means nothing.

    python3 tools/random_model.py --shape deepseek-coder-1.3b --tokenizer models/tiny-gqa --out build/random-1.3b

Needs torch and safetensors. Weights are bf16, normal with standard deviation 0.02, norms 1: activations stay in a sane range.
"""

import argparse
import json
import pathlib
import shutil

import torch
from safetensors.torch import save_file

# hidden, layers, heads, kv heads, head dimension, feed-forward, vocabulary, RoPE base: as the models of these names have them.
SHAPES = {
    "deepseek-coder-1.3b": (2048, 24, 16, 16, 128, 5504, 32256, 100000.0),
    "llama-3.2-1b": (2048, 16, 32, 8, 64, 8192, 128256, 500000.0),
}
CONTEXT = 131072  # as long as one wants to measure


def tensors(hidden, layers, heads, kv_heads, head_dim, ffn, vocabulary, tied):
    generator = torch.Generator().manual_seed(1)
    normal = lambda *sizes: torch.empty(sizes, dtype=torch.bfloat16).normal_(0.0, 0.02, generator=generator)
    ones = lambda: torch.ones(hidden, dtype=torch.bfloat16)
    out = {"model.embed_tokens.weight": normal(vocabulary, hidden), "model.norm.weight": ones()}
    if not tied:
        out["lm_head.weight"] = normal(vocabulary, hidden)
    for i in range(layers):
        layer = f"model.layers.{i}."
        out[layer + "input_layernorm.weight"] = ones()
        out[layer + "post_attention_layernorm.weight"] = ones()
        out[layer + "self_attn.q_proj.weight"] = normal(heads * head_dim, hidden)
        out[layer + "self_attn.k_proj.weight"] = normal(kv_heads * head_dim, hidden)
        out[layer + "self_attn.v_proj.weight"] = normal(kv_heads * head_dim, hidden)
        out[layer + "self_attn.o_proj.weight"] = normal(hidden, heads * head_dim)
        out[layer + "mlp.gate_proj.weight"] = normal(ffn, hidden)
        out[layer + "mlp.up_proj.weight"] = normal(ffn, hidden)
        out[layer + "mlp.down_proj.weight"] = normal(hidden, ffn)
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", required=True, choices=sorted(SHAPES))
    parser.add_argument("--tokenizer", required=True, type=pathlib.Path, help="a model folder whose tokenizer is copied; its ids must fit")
    parser.add_argument("--out", required=True, type=pathlib.Path)
    args = parser.parse_args()

    hidden, layers, heads, kv_heads, head_dim, ffn, vocabulary, theta = SHAPES[args.shape]
    tied = args.shape == "llama-3.2-1b"
    args.out.mkdir(parents=True)
    for file in args.tokenizer.glob("tokenizer*"):
        shutil.copy(file, args.out)
    save_file(tensors(hidden, layers, heads, kv_heads, head_dim, ffn, vocabulary, tied), args.out / "model.safetensors", {"format": "pt"})
    ids = json.loads((args.tokenizer / "config.json").read_text())
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim, "intermediate_size": ffn,
        "vocab_size": vocabulary, "rope_theta": theta, "rms_norm_eps": 1e-5, "max_position_embeddings": CONTEXT,
        "hidden_act": "silu", "tie_word_embeddings": tied, "attention_bias": False, "torch_dtype": "bfloat16",
        "bos_token_id": ids["bos_token_id"], "eos_token_id": ids["eos_token_id"],
    }
    (args.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()
