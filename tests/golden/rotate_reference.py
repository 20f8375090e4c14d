#!/usr/bin/env python3
"""Independent reference of the rotate* key-value formats, by fake quantization in fp32 on Hugging Face transformers.

Nothing here is packed: keys and values are quantized and dequantized in place, and attention runs on the result. It is
the oracle of the C++ tests (`golden` writes tests/golden/rotate_tiny_gqa.json) and the second opinion on every published
figure (`ppl`, `task`). Paper: RotateKV, arXiv 2501.16383.

    rotate_reference.py ppl    --model DIR --text FILE --windows 24 --method rotate --bits 2 --recent 64 --calibration FILE
    rotate_reference.py task   --model DIR --jsonl FILE --lines 100 --method rotate --bits 2 --calibration FILE
    rotate_reference.py golden --model DIR --text FILE --calibration FILE --out FILE

Every command prints one JSON line per result. Needs torch, transformers and, by tokenizer, sentencepiece or tokenizers.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import pathlib
import sys
import time

import torch
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


# ---------------------------------------------------------------------------------------------------------------------
# Text


class Tokenizer:
    """The tokenizer of a model folder, without special tokens: `tokenizer.model` (SentencePiece) or `tokenizer.json`."""

    def __init__(self, folder):
        folder = pathlib.Path(folder)
        if (folder / "tokenizer.model").exists():
            import sentencepiece

            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
            self.encode = lambda text: self._processor.encode(text)
        else:
            import tokenizers

            self._processor = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            self.encode = lambda text: self._processor.encode(text, add_special_tokens=False).ids


def read_text(path):
    """The file as it is (UTF-8, no newline translation)."""
    return pathlib.Path(path).read_bytes().decode("utf-8")


def windows_of(ids, window_len, bos, max_windows):
    """Cuts ids into windows of BOS + (window_len - 1) tokens that do not overlap; a shorter rest is dropped."""
    step = window_len - 1
    count = min(len(ids) // step, max_windows)
    return [[bos] + ids[i * step : (i + 1) * step] for i in range(count)]


# ---------------------------------------------------------------------------------------------------------------------
# Quantizer and rotation


def hadamard(n):
    """Normalized Walsh-Hadamard matrix of Sylvester order, fp32 [n, n], symmetric and its own inverse."""
    if n & (n - 1):
        raise SystemExit(f"hadamard: size {n} is not a power of two")
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return (matrix / math.sqrt(n)).float()


def fake_quant(x, bits, clip, group, zero, meta):
    """Asymmetric min-max quantization of groups of `group` neighbouring channels of the last dimension, and back.

    lo = clip * min, hi = clip * max, s = (hi - lo) / (2^bits - 1), rounded to fp16 first when meta == "fp16"; rounding is
    to nearest, ties to even. `zero` says how the offset is kept:
      integer  z = round(-lo / s), any integer;     q = clamp(round(x / s) + z, 0, 2^bits - 1), x~ = s (q - z)
      int8     the same with z clamped to [-128, 127]
      code     the same with z clamped to [0, 2^bits - 1] (as wide as a code)
      minimum  lo itself (fp16 when meta == "fp16"); q = clamp(round((x - lo) / s), 0, 2^bits - 1), x~ = s q + lo
    A constant group comes back as it is (up to the rounding of meta).
    """
    shape = x.shape
    x = x.reshape(*shape[:-1], shape[-1] // group, group)
    q_max = 2**bits - 1
    x_min = x.amin(-1, keepdim=True)
    x_max = x.amax(-1, keepdim=True)
    stored = (lambda t: t.half().float()) if meta == "fp16" else (lambda t: t)
    lo = clip * x_min
    s = stored((clip * x_max - lo) / q_max)
    safe = torch.where(s > 0, s, torch.ones_like(s))
    if zero == "minimum":
        lo = stored(lo)
        y = s * ((x - lo) / safe).round().clamp(0, q_max) + lo
    else:
        z = (-lo / safe).round()
        if zero == "int8":
            z = z.clamp(-128, 127)
        elif zero == "code":
            z = z.clamp(0, q_max)
        elif zero != "integer":
            raise SystemExit(f"zero: got {zero}, expected integer, int8, code or minimum")
        y = s * (((x / safe).round() + z).clamp(0, q_max) - z)
    y = torch.where(x_max == x_min, stored(x), y)
    return y.reshape(shape)


@dataclasses.dataclass
class Settings:
    """One cache format. method: exact, rotate, or rtn (per token and head, no rotation, no sinks unless asked for)."""

    method: str = "rotate"
    bits: int = 2
    clip: float = None  # None: 0.8 at 2 bits, 1.0 above (rtn: 1.0)
    clip_values: float = None  # None: like clip
    group: int = None  # None: 128 channels (rtn: head_dim)
    heads: int = None  # heads in one key rotation; None: gcd(4, n_kv_heads)
    reorder: str = "layer"  # layer, group (within each rotation), none
    zero: str = "integer"
    meta: str = "fp32"  # precision of scale and minimum: fp32 or fp16
    exact: str = "fp32"  # precision of sinks and of the recent window: fp32 or fp16
    sinks: int = 20  # largest |hidden| entries, not tokens
    recent: int = 0  # query i sees keys j > i - recent exactly
    rope: str = "pre"  # keys are quantized before (pre) or after (post) RoPE

    def resolve(self, config):
        """A copy with every None filled in for the model's config."""
        out = dataclasses.replace(self)
        if out.clip is None:
            out.clip = 0.8 if out.method == "rotate" and out.bits == 2 else 1.0
        if out.clip_values is None:
            out.clip_values = out.clip
        if out.group is None:
            out.group = 128 if out.method == "rotate" else config.head_dim
        if out.heads is None:
            out.heads = math.gcd(4, config.num_key_value_heads)
        return out


class FakeQuantAttention(nn.Module):
    """LLaMA attention whose keys and values pass through `settings`; takes over the projections of the given module."""

    def __init__(self, attention, config, shared):
        super().__init__()
        self.q_proj, self.k_proj = attention.q_proj, attention.k_proj
        self.v_proj, self.o_proj = attention.v_proj, attention.o_proj
        self.n_kv_heads, self.head_dim = config.num_key_value_heads, config.head_dim
        self.n_heads = config.num_attention_heads
        self.layer = attention.layer_idx
        self.shared = shared  # the Reference: settings, permutations, per-call records
        self.sink_tokens = None  # set by the layer's pre-hook

    def _quantize_keys(self, k):
        """k [T, Hkv, d] -> the same shape, quantized."""
        s, n_tokens = self.shared.settings, k.shape[0]
        if s.method == "rtn":
            return fake_quant(k.flatten(1), s.bits, s.clip, s.group, s.zero, s.meta).view_as(k)
        w = hadamard(s.heads * self.head_dim)
        r = (k.reshape(n_tokens, self.n_kv_heads // s.heads, -1) @ w).flatten(1)
        perm = self.shared.perm(self.layer)
        r = fake_quant(r[:, perm], s.bits, s.clip, s.group, s.zero, s.meta)[:, perm.argsort()]
        return (r.reshape(n_tokens, self.n_kv_heads // s.heads, -1) @ w).view_as(k)

    def _quantize_values(self, v):
        """v [T, Hkv, d] -> the same shape, quantized."""
        s = self.shared.settings
        if s.method == "rtn":
            return fake_quant(v.flatten(1), s.bits, s.clip_values, s.group, s.zero, s.meta).view_as(v)
        w = hadamard(self.head_dim)
        r = fake_quant((v @ w).flatten(1), s.bits, s.clip_values, s.group, s.zero, s.meta)
        return r.view_as(v) @ w

    def _attend(self, q, k, v, k_hat, v_hat, keep):
        """Causal attention [T, Hq, d]; pair (i, j) uses the exact k, v where keep[i, j] and k_hat, v_hat elsewhere.

        q [Hq, T, d] and the others [Hkv, T, d] after RoPE; keep is None when everything is exact.
        """
        n_heads, n_tokens, head_dim = q.shape
        out = torch.empty(n_tokens, n_heads, head_dim)
        q = q / math.sqrt(head_dim)
        block = 512  # blocks of queries skip the keys that none of them may see
        for begin in range(0, n_tokens, block):
            end = min(begin + block, n_tokens)
            future = torch.ones(end - begin, end, dtype=torch.bool).triu(begin + 1)
            exact = None if keep is None else keep[begin:end, :end] & ~future
            for head in range(n_heads):
                g = head * k.shape[0] // n_heads
                query = q[head, begin:end]
                if exact is None:
                    p = (query @ k[g, :end].T).masked_fill_(future, -torch.inf).softmax(-1)
                    out[begin:end, head] = p @ v[g, :end]
                    continue
                scores = query @ k_hat[g, :end].T
                if exact.any():
                    scores = torch.where(exact, query @ k[g, :end].T, scores)
                p = scores.masked_fill_(future, -torch.inf).softmax(-1)
                out[begin:end, head] = p @ v_hat[g, :end]
                if exact.any():
                    out[begin:end, head] += (p * exact) @ (v[g, :end] - v_hat[g, :end])
        return out

    def forward(self, hidden_states, position_embeddings, **_):
        s = self.shared.settings
        n_tokens = hidden_states.shape[1]
        x = hidden_states[0]
        cos, sin = position_embeddings
        rope = lambda t: apply_rotary_pos_emb(t.transpose(0, 1)[None], t.transpose(0, 1)[None], cos, sin)[0][0]
        q = rope(self.q_proj(x).view(n_tokens, self.n_heads, self.head_dim))  # [Hq, T, d]
        k = self.k_proj(x).view(n_tokens, self.n_kv_heads, self.head_dim)
        v = self.v_proj(x).view(n_tokens, self.n_kv_heads, self.head_dim)
        if self.shared.key_sums is not None:
            w = hadamard(self.shared.key_sums_heads * self.head_dim)
            r = k.reshape(n_tokens, self.n_kv_heads // self.shared.key_sums_heads, -1) @ w
            self.shared.key_sums[self.layer] += r.flatten(1).double().sum(0)

        k_hat = v_hat = keep = None
        if s.method != "exact":
            k_hat = rope(self._quantize_keys(k)) if s.rope == "pre" else None
            v_hat = self._quantize_values(v).transpose(0, 1)
            index = torch.arange(n_tokens)
            keep = index[:, None] - index[None, :] < s.recent
            if s.sinks:
                keep[:, self.sink_tokens] = True
            if s.exact == "fp16":
                k, v = k.half().float(), v.half().float()  # a cache keeps keys before RoPE
        k_rope, v = rope(k), v.transpose(0, 1)
        if s.method != "exact" and s.rope == "post":
            k_hat = self._quantize_keys(k_rope.transpose(0, 1)).transpose(0, 1)
        out = self._attend(q, k_rope, v, k_hat, v_hat, keep)
        y = self.o_proj(out.flatten(1))
        if self.shared.records is not None:
            sinks = [] if self.sink_tokens is None else self.sink_tokens.tolist()
            self.shared.records[self.layer] = dict(k=k, v=v.transpose(0, 1), k_hat=k_hat, v_hat=v_hat, sinks=sinks, out=y)
        return y[None], None


class Reference:
    """A model with fake-quantized attention. Set `settings`, call `logits`; `calibrate` fills `sums`."""

    def __init__(self, folder):
        self.model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.config = self.model.config
        self.settings = Settings(method="exact")
        self.sums = None  # [layers, D] fp64: signed channel sums of the rotated keys
        self.records = None  # dict per layer of the last call, when not None
        self.key_sums = None
        self.key_sums_heads = math.gcd(4, self.config.num_key_value_heads)
        self._perms = {}
        for layer in self.model.model.layers:
            layer.self_attn = FakeQuantAttention(layer.self_attn, self.config, self)
            layer.register_forward_pre_hook(self._find_sinks, with_kwargs=True)

    def _find_sinks(self, layer, args, kwargs):
        hidden = (args[0] if args else kwargs["hidden_states"])[0]  # [T, hidden]
        count = min(self.settings.sinks, hidden.numel())
        top = hidden.abs().flatten().topk(count).indices
        layer.self_attn.sink_tokens = (top // hidden.shape[1]).unique()

    def use(self, settings):
        self.settings = settings.resolve(self.config)
        self._perms = {}

    def perm(self, layer):
        """Channel order of the layer: r[perm] is what is grouped."""
        s = self.settings
        n_channels = self.config.num_key_value_heads * self.config.head_dim
        if layer not in self._perms:
            if s.reorder == "none":
                perm = torch.arange(n_channels)
            elif self.sums is None:
                raise SystemExit(f"reorder={s.reorder} needs --calibration")
            elif s.reorder == "layer":
                perm = self.sums[layer].argsort(stable=True)
            else:
                block = s.heads * self.config.head_dim
                blocks = self.sums[layer].view(-1, block)
                perm = (blocks.argsort(dim=1, stable=True) + torch.arange(len(blocks))[:, None] * block).flatten()
            self._perms[layer] = perm
        return self._perms[layer]

    @torch.no_grad()
    def hidden(self, ids):
        """Final normed hidden states [T, hidden] of one sequence."""
        return self.model.model(input_ids=torch.tensor([ids]), use_cache=False)[0][0]

    @torch.no_grad()
    def nll(self, ids):
        """Negative log likelihood [T - 1] of every token but the first."""
        logits = self.model.lm_head(self.hidden(ids)[:-1])
        return nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")

    def calibrate(self, windows):
        """Signed channel sums of the rotated keys of the exact model over the windows."""
        before, self.settings = self.settings, Settings(method="exact")
        n_channels = self.config.num_key_value_heads * self.config.head_dim
        self.key_sums = torch.zeros(self.config.num_hidden_layers, n_channels, dtype=torch.float64)
        for ids in windows:
            self.hidden(ids)
        self.sums, self.key_sums, self.settings, self._perms = self.key_sums, None, before, {}


# ---------------------------------------------------------------------------------------------------------------------
# Protocols


def perplexity(reference, windows, progress=None):
    """exp of the mean NLL over all tokens of all windows but BOS, and the running values."""
    total, count, running = 0.0, 0, []
    for i, ids in enumerate(windows):
        nll = reference.nll(ids).double()
        total, count = total + nll.sum().item(), count + len(nll)
        running.append(math.exp(total / count))
        if progress:
            progress(i, running[-1])
    return running[-1], running


def exact_match(reference, prompt_ids, answer_ids):
    """True when, under teacher forcing, every answer token is the most likely one."""
    hidden = reference.hidden(prompt_ids + answer_ids)[len(prompt_ids) - 1 : -1]
    with torch.no_grad():
        best = reference.model.lm_head(hidden).argmax(-1)
    return best.tolist() == answer_ids
