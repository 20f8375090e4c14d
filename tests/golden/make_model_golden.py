"""Makes the reference values that tests/model and tests/ops compare with, from Hugging Face transformers 4.57 in fp32.

    python make_model_golden.py [--only models|rope|shipped]

Writes models/<case>/ (a random tiny checkpoint with its logits), rope.json (frequencies of every rope type) and, for the
shipped model, tiny_gqa_logits.safetensors and tiny_gqa_greedy.json. Deterministic for one version of torch and transformers.
"""

import argparse
import json
import math
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers.cache_utils import DynamicCache

HERE = Path(__file__).resolve().parent
SHIPPED = HERE.parent.parent / "models" / "tiny-gqa"
SEQ_LEN = 40
VOCAB = 128

# name -> (family, dtype of the stored weights, config). Lengths beyond original_max_position_embeddings where that matters.
CASES = {
    "llama_mha64": ("Llama", "bfloat16", dict(hidden_size=32, num_attention_heads=2, num_key_value_heads=2, head_dim=64)),
    "llama_derived_head_dim": ("Llama", "float32", dict(intermediate_size=80, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1)),
    "llama_gqa80_llama3": ("Llama", "bfloat16", dict(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=80, rope_theta=500000.0, max_position_embeddings=128,
        rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16))),
    "llama_mqa96_linear_biases": ("Llama", "float16", dict(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=1, head_dim=96, intermediate_size=64, attention_bias=True, mlp_bias=True,
        rope_scaling=dict(rope_type="linear", factor=2.5))),
    "llama_gqa112_dynamic_tied": ("Llama", "bfloat16", dict(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=112, num_hidden_layers=1, tie_word_embeddings=True, max_position_embeddings=16,
        rope_scaling=dict(rope_type="dynamic", factor=2.0))),
    "llama_gqa128_yarn_sharded": ("Llama", "float16", dict(
        hidden_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=128, max_position_embeddings=64,
        rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16))),
    "llama_yarn_attention_factor": ("Llama", "bfloat16", dict(
        num_attention_heads=2, num_key_value_heads=1, head_dim=64, num_hidden_layers=1, max_position_embeddings=16,
        rope_scaling=dict(type="yarn", factor=4.0, attention_factor=1.3, beta_fast=8.0, beta_slow=2.0))),
    "llama_yarn_mscale": ("Llama", "bfloat16", dict(
        num_attention_heads=2, num_key_value_heads=1, head_dim=64, num_hidden_layers=1, max_position_embeddings=64,
        rope_scaling=dict(rope_type="yarn", factor=8.0, mscale=1.0, mscale_all_dim=0.5, truncate=False, original_max_position_embeddings=20))),
    "llama_rope_parameters": ("Llama", "bfloat16", dict(
        num_attention_heads=2, num_key_value_heads=1, head_dim=64, num_hidden_layers=1, rope_theta=50000.0,
        rope_scaling=dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16))),
    "mistral_gqa64_window": ("Mistral", "bfloat16", dict(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=64, sliding_window=7)),
    "mistral_mqa256": ("Mistral", "bfloat16", dict(
        hidden_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=256, num_hidden_layers=1, sliding_window=None)),
    "qwen2_derived_tied": ("Qwen2", "bfloat16", dict(hidden_size=128, intermediate_size=48, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=1,
                                                   tie_word_embeddings=True, rope_theta=1000000.0)),
    "qwen2_window": ("Qwen2", "float16", dict(
        hidden_size=32, num_attention_heads=2, num_key_value_heads=2, head_dim=64, use_sliding_window=True, sliding_window=5,
        max_window_layers=0, rope_scaling=dict(type="yarn", factor=4.0, original_max_position_embeddings=16))),
    "qwen3_gqa128_tied": ("Qwen3", "bfloat16", dict(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=128, num_hidden_layers=1, tie_word_embeddings=True, rope_theta=1000000.0)),
    "qwen3_mha96_bias": ("Qwen3", "float16", dict(
        hidden_size=32, num_attention_heads=2, num_key_value_heads=2, head_dim=96, attention_bias=True, max_position_embeddings=16,
        rope_scaling=dict(rope_type="dynamic", factor=3.0))),
}
RENAME_ROPE = {"llama_rope_parameters"}  # config.json rewritten in the form of transformers 5
SHARDED = {"llama_gqa128_yarn_sharded"}


def fp32_logits(folder, tokens):
    # Read afresh: a model that was in 16 bits and goes back to fp32 keeps rotary frequencies rounded to 16 bits.
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(tokens[None], use_cache=False).logits[0]


def make_case(index, name):
    family, dtype, options = CASES[name]
    base = dict(vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, max_position_embeddings=64, rms_norm_eps=1e-5,
                bos_token_id=1, eos_token_id=2)
    config = getattr(transformers, family + "Config")(**{**base, **options})
    config._attn_implementation = "eager"
    torch.manual_seed(1000 + index)
    model = getattr(transformers, family + "ForCausalLM")(config).float()
    with torch.no_grad():
        for key, p in model.named_parameters():  # larger than the usual start, so that attention is far from uniform
            if key.endswith("norm.weight"):
                p.copy_(1.0 + 0.3 * torch.randn_like(p))
            elif key.endswith("bias"):
                p.copy_(0.3 * torch.randn_like(p))
            else:
                p.copy_(torch.randn_like(p) * (0.5 if "embed" in key else 1.3 / math.sqrt(p.shape[1])))
    model = model.to(getattr(torch, dtype))
    folder = HERE / "models" / name
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    model.save_pretrained(folder, max_shard_size="50KB" if name in SHARDED else "1GB")
    (folder / "generation_config.json").unlink(missing_ok=True)
    tokens = torch.randint(0, VOCAB, (SEQ_LEN,))
    logits = fp32_logits(folder, tokens)
    if name in RENAME_ROPE:
        config_json = json.loads((folder / "config.json").read_text())
        config_json["rope_parameters"] = {"rope_theta": config_json.pop("rope_theta"), **config_json.pop("rope_scaling")}
        (folder / "config.json").write_text(json.dumps(config_json, indent=2) + "\n")
    save_file({"tokens": tokens, "logits": logits.contiguous()}, folder / "golden.safetensors")
    total = sum(f.stat().st_size for f in folder.iterdir())
    print(f"{name}: {total / 1024:.0f} KiB, logits rms {logits.pow(2).mean().sqrt():.3f}")


def make_rope():
    """Frequencies from transformers for many settings; cos and sin of the first positions from its rotary module."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    settings = [("default", 10000.0, None), ("default", 1000000.0, None), ("linear", 10000.0, dict(rope_type="linear", factor=4.0)),
                ("dynamic", 10000.0, dict(rope_type="dynamic", factor=2.0)),
                ("llama3", 500000.0, dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                          original_max_position_embeddings=8192)),
                ("yarn", 1000000.0, dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32768)),
                ("yarn", 10000.0, dict(rope_type="yarn", factor=40.0, mscale=1.0, mscale_all_dim=0.7, beta_fast=16.0, beta_slow=2.0,
                                       original_max_position_embeddings=4096)),
                ("yarn", 10000.0, dict(rope_type="yarn", factor=16.0, attention_factor=0.9, truncate=False, original_max_position_embeddings=64)),
                ("yarn", 150000.0, dict(rope_type="yarn", factor=32.0))]
    rows = []
    for head_dim in (64, 80, 128, 256):
        for kind, theta, scaling in settings:
            config = transformers.LlamaConfig(hidden_size=head_dim, num_attention_heads=1, head_dim=head_dim, rope_theta=theta,
                                              rope_scaling=dict(scaling) if scaling else None, max_position_embeddings=4096)
            for seq_len in (100, 4096, 4097, 20000) if kind == "dynamic" else (100,):
                rope = LlamaRotaryEmbedding(config)
                positions = torch.tensor([0, 1, 2, 17, 63]) if kind != "dynamic" else torch.tensor([0, 1, 17, seq_len - 1])
                cos, sin = rope(torch.zeros(1, dtype=torch.float32), positions[None])
                half = head_dim // 2
                n = 4 if kind != "dynamic" else 3  # the last position of `dynamic` only tells the length
                rows.append(dict(config=dict(rope_theta=theta, rope_scaling=scaling), head_dim=head_dim, max_position_embeddings=4096,
                                 seq_len=seq_len, inv_freq=[float(x) for x in rope.inv_freq], attention_factor=rope.attention_scaling,
                                 positions=positions[:n].tolist(),
                                 cos=[[round(float(x), 8) for x in row[:half]] for row in cos[0][:n]] if head_dim == 64 else None,
                                 sin=[[round(float(x), 8) for x in row[:half]] for row in sin[0][:n]] if head_dim == 64 else None))
    path = HERE / "rope.json"
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    print(f"rope.json: {len(rows)} rows, {path.stat().st_size / 1024:.0f} KiB")


# Own words, so that nothing else has to be there.
TEXT = """The harbour lay quiet under a thin layer of fog when the first boats came back in the morning. Along the quay the
merchants had already set up their tables, and the smell of salt, tar and fresh bread hung between the houses. In the year
1874 the town counted some four thousand people, most of whom lived from fishing, from the building of small ships, or from
the trade with the islands to the north. A railway had been promised several times, but the hills behind the town were steep
and the money was short, so that goods still went by road or by water. The old church, whose tower could be seen from far out
at sea, was built in the twelfth century and had been burned down twice; its bell was cast in 1652. What the visitors liked
best, however, was the library, a long room with high windows in which an uncle of the present mayor had collected books on
navigation, on the tides, and on the history of the coast."""
# Of a handful of prompts the one whose greedy choices are the clearest: the smallest margin decides how far two programs may
# differ in rounding before they part.
PROMPT = """A hash table is a data structure that stores pairs of keys and values. To look up a key, the program computes a
number from it and uses that number as an index into an array of buckets. When two keys fall into the same bucket, this is
called a collision, and"""


def tokenize(text, n):
    import sentencepiece

    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(SHIPPED / "tokenizer.model"))
    return ([1] + tokenizer.encode(" ".join(text.split())))[:n]


class RoundedCache(DynamicCache):
    """Keys (after RoPE) and values are rounded to `dtype` when they enter; arithmetic stays in fp32."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def update(self, key_states, value_states, layer_idx, cache_kwargs=None):
        return super().update(key_states.to(self.dtype).float(), value_states.to(self.dtype).float(), layer_idx, cache_kwargs)


def greedy(model, prompt, dtype, n_tokens):
    cache = RoundedCache(dtype)
    ids, continuation, smallest_margin = torch.tensor([prompt]), [], math.inf
    with torch.no_grad():
        for _ in range(n_tokens):
            logits = model(ids, past_key_values=cache, use_cache=True).logits[0, -1]
            top = torch.topk(logits, 2)
            smallest_margin = min(smallest_margin, float(top.values[0] - top.values[1]))
            continuation.append(int(top.indices[0]))
            ids = torch.tensor([[continuation[-1]]])
    return continuation, smallest_margin


def make_shipped():
    model = transformers.AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32, attn_implementation="eager").eval()
    tokens = torch.tensor(tokenize(TEXT, 200))
    assert len(tokens) == 200, len(tokens)
    logits = fp32_logits(SHIPPED, tokens)
    rows = torch.tensor([0, 1, 63, 128, 199])
    top = torch.topk(logits, 8)
    save_file({"tokens": tokens, "rows": rows, "logits": logits[rows].contiguous(), "top_values": top.values.contiguous(),
               "top_ids": top.indices.to(torch.int32).contiguous(), "logsumexp": torch.logsumexp(logits, -1)}, HERE / "tiny_gqa_logits.safetensors")
    prompt = tokenize(PROMPT, 60)
    result = {"prompt": prompt, "n_tokens": 256, "continuations": {}}
    for name in ("float32", "bfloat16", "float16"):
        continuation, margin = greedy(model, prompt, getattr(torch, name), 256)
        result["continuations"][name] = {"ids": continuation, "smallest_margin": margin}
        print(f"greedy {name}: smallest margin {margin:.5f}, {len(set(continuation))} distinct ids")
    (HERE / "tiny_gqa_greedy.json").write_text(json.dumps(result) + "\n")


def main():
    global SHIPPED
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", choices=["models", "rope", "shipped"])
    parser.add_argument("--shipped", type=Path, default=SHIPPED, help="the shipped model's folder")
    args = parser.parse_args()
    SHIPPED = args.shipped
    assert transformers.__version__.startswith("4.57"), transformers.__version__
    torch.set_num_threads(1)
    if args.only in (None, "models"):
        for index, name in enumerate(CASES):
            make_case(index, name)
    if args.only in (None, "rope"):
        make_rope()
    if args.only in (None, "shipped"):
        make_shipped()


if __name__ == "__main__":
    main()
