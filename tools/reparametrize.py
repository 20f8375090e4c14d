#!/usr/bin/env python3
"""Makes a test checkpoint out of a given one: the same model with key outlier channels, or one with large key biases.

    reparametrize.py --model DIR --out DIR --scale-pairs 6 --factor 8 [--seed 0]
    reparametrize.py --model DIR --out DIR --key-bias 60 --pairs 4 [--rope-theta T]

Both may be given together. README.md beside this file says what each is for. LLaMA and Qwen2 checkpoints in safetensors; needs torch
and safetensors.
"""

import argparse
import json
import math
import pathlib
import shutil
import sys

import torch
from safetensors.torch import load_file, save_file


class Checkpoint:
    """Tensors by name and the configuration of a Hugging Face folder."""

    def __init__(self, folder):
        self.config = json.loads((folder / "config.json").read_text())
        self.tensors = {}
        for path in sorted(folder.glob("*.safetensors")):
            self.tensors |= load_file(path)
        if not self.tensors:
            raise SystemExit(f"{folder}: no *.safetensors")
        if self.config["model_type"] not in ("llama", "qwen2"):
            raise SystemExit(f"{folder}: model_type is {self.config['model_type']}, expected llama or qwen2")
        if any(name.endswith("o_proj.bias") for name in self.tensors):
            raise SystemExit(f"{folder}: attention has an output bias, which Qwen2 has no room for")
        self.n_layers = self.config["num_hidden_layers"]
        self.n_heads = self.config["num_attention_heads"]
        self.n_kv_heads = self.config.get("num_key_value_heads") or self.n_heads
        self.head_dim = self.config.get("head_dim") or self.config["hidden_size"] // self.n_heads

    def scale_rows(self, layer, projection, factors):
        """Multiplies the rows of a projection's weight, and its bias where it has one, by factors [rows]."""
        for name in (f"model.layers.{layer}.self_attn.{projection}.{part}" for part in ("weight", "bias")):
            if name in self.tensors:
                old = self.tensors[name]
                scaled = old.double() * (factors[:, None] if old.dim() == 2 else factors)
                self.tensors[name] = scaled.to(old.dtype)

    def scale_pairs(self, count, factor, seed):
        """`count` RoPE pairs (channels i and i + head_dim / 2) of every kv head: keys times factor, its queries divided by it."""
        generator = torch.Generator().manual_seed(seed)
        half = self.head_dim // 2
        for layer in range(self.n_layers):
            keys = torch.ones(self.n_kv_heads, self.head_dim, dtype=torch.float64)
            for head in keys:
                pairs = torch.randperm(half, generator=generator)[:count]
                head[pairs] = head[pairs + half] = factor
            queries = keys.reciprocal().repeat_interleave(self.n_heads // self.n_kv_heads, 0)
            self.scale_rows(layer, "k_proj", keys.flatten())
            self.scale_rows(layer, "q_proj", queries.flatten())

    def add_key_bias(self, bias, count):
        """Turns the model into Qwen2 and adds `bias` to the key biases of the `count` RoPE pairs of lowest frequency of every head."""
        half = self.head_dim // 2
        added = torch.zeros(self.n_kv_heads, self.head_dim, dtype=torch.float64)
        added[:, half - count : half] = added[:, self.head_dim - count :] = bias
        for layer in range(self.n_layers):
            for projection in ("q_proj", "k_proj", "v_proj"):
                name = f"model.layers.{layer}.self_attn.{projection}"
                weight = self.tensors[f"{name}.weight"]
                old = self.tensors.get(f"{name}.bias", torch.zeros(weight.shape[0], dtype=weight.dtype))
                new = old.double() + added.flatten() if projection == "k_proj" else old
                self.tensors[f"{name}.bias"] = new.to(old.dtype)
        for key in ("attention_bias", "mlp_bias", "pretraining_tp"):
            self.config.pop(key, None)
        self.config |= {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False}

    def save(self, source, out):
        """One model.safetensors, config.json and everything else of the source folder as it is."""
        out.mkdir(parents=True, exist_ok=True)
        for path in source.iterdir():
            if path.is_file() and path.suffix != ".safetensors" and path.name not in ("config.json", "model.safetensors.index.json"):
                shutil.copyfile(path, out / path.name)
        weights = out / "model.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in self.tensors.items()}, weights, {"format": "pt"})
        weights.chmod(0o644)  # as config.json; save_file leaves it to its owner alone
        (out / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=pathlib.Path)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--scale-pairs", type=int, default=0, metavar="N", help="RoPE pairs of every kv head, chosen at random")
    parser.add_argument("--factor", type=float, default=8.0, help="of their keys; a power of two keeps the model exactly the same")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--key-bias", type=float, default=0.0, metavar="B")
    parser.add_argument("--pairs", type=int, default=4, metavar="N", help="RoPE pairs of lowest frequency that get the bias")
    parser.add_argument("--rope-theta", type=float, help="another base of the RoPE frequencies (changes the model)")
    args = parser.parse_args()

    if args.out.resolve() == args.model.resolve():
        parser.error("--out is --model")
    checkpoint = Checkpoint(args.model)
    half = checkpoint.head_dim // 2
    for name, count in (("--scale-pairs", args.scale_pairs), ("--pairs", args.pairs)):
        if not 0 <= count <= half:
            parser.error(f"{name}: got {count}, expected 0 .. {half}")
    if not math.isfinite(args.factor) or args.factor <= 0:
        parser.error(f"--factor: got {args.factor}, expected a number above 0")
    if not args.scale_pairs and not args.key_bias and args.rope_theta is None:
        parser.error("nothing to do: give --scale-pairs, --key-bias or --rope-theta")
    if args.scale_pairs:
        if math.frexp(args.factor)[0] != 0.5:
            print(f"reparametrize: factor {args.factor} is no power of two: weights are rounded", file=sys.stderr)
        checkpoint.scale_pairs(args.scale_pairs, args.factor, args.seed)
    if args.key_bias:
        checkpoint.add_key_bias(args.key_bias, args.pairs)
    if args.rope_theta is not None:
        checkpoint.config["rope_theta"] = args.rope_theta
    checkpoint.save(args.model, args.out)


if __name__ == "__main__":
    main()
