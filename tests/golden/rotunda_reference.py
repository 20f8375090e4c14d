#!/usr/bin/env python3
"""Independent reference of rotunda2/3/4, the house key-value format, by fake quantization in fp32 on Hugging Face transformers.

Nothing here is packed: keys and values go through the quantizer and back in place, and attention runs on the result. It is the
oracle of the C++ tests (`golden` writes tests/golden/rotunda_tiny_gqa.json) and the second opinion on published figures.
LLaMA and Qwen2 checkpoints (biases of q, k, v) whose head dimension is a power of two.

    rotunda_reference.py ppl    --model DIR --text FILE --windows 4 --window-len 2048 --spec rotunda2 --spec rotunda2:feedback=none
    rotunda_reference.py task   --model DIR --jsonl FILE --lines 100 --spec rotunda2:shift=mean --calibration FILE
    rotunda_reference.py golden --model DIR --text FILE --calibration FILE --out FILE

A spec is `exact` or rotunda2, rotunda3, rotunda4 with options (`Settings` below): rotunda2:values=4,balance=none,recent=0. Every command
prints one JSON line per spec. Needs torch, transformers and, by tokenizer, sentencepiece or tokenizers.

The method, for one kv head of dimension d (row vectors; H: normalized Hadamard matrix; R_n: RoPE at position n; L = diag(lambda)):
a key is stored as codes of y = ((k - mu) L) R_n H and read as y~ H L^-1 + mu R_n; a value as codes of v H.
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
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from rotate_reference import Tokenizer, exact_match, hadamard, read_text, rounded, task_ids, windows_of

# ---------------------------------------------------------------------------------------------------------------------
# Settings


# What the winning step is divided by, one try of feedback after the other.
FEEDBACK_TRIES = (1.0, 1.07, 0.93, 1.15, 0.87, 1.25, 0.81)


@dataclasses.dataclass
class Settings:
    """One cache format; the defaults are rotunda2's without calibration."""

    bits: int = 2  # of keys; 16: everything exact
    values: int = None  # bits of values; None: like keys
    balance: str = "weights"  # weights, calibrated, none
    shift: str = "bias"  # bias, mean (calibrated), none
    shift_pairs: float = 0.99  # share of the energy of mu L that the shifted RoPE pairs must hold, the fewest; 1 or `all`: all pairs
    feedback: str = "weights"  # weights, calibrated, none
    positions: float = None  # feedback=weights averages over positions 0 .. positions - 1, may be inf; None: min(trained context, 4096)
    feedback_scale: str = "least_squares"  # the scale that feedback reckons errors with, of the codes without feedback: least_squares, unbiased
    feedback_steps: int = len(FEEDBACK_TRIES)  # feedback is run at the first so many of FEEDBACK_TRIES, and the codes of least cost are kept
    damping: float = 0.01  # of the mean diagonal, added before the inverse
    scale: str = "unbiased"  # unbiased, least_squares
    recent: int = 64  # query i sees keys j > i - recent exactly
    first: int = 4  # tokens at the start that every query sees exactly
    sinks: int = 0  # also the tokens of that many largest |hidden| entries of the layer's input
    exact: str = "fp16"  # precision of exact tokens: fp16 or fp32

    def needs_calibration(self):
        return "calibrated" in (self.balance, self.feedback) or self.shift == "mean"


EXACT = Settings(bits=16)

CHOICES = {
    "balance": ("weights", "calibrated", "none"),
    "shift": ("bias", "mean", "none"),
    "feedback": ("weights", "calibrated", "none"),
    "feedback_scale": ("unbiased", "least_squares"),
    "scale": ("unbiased", "least_squares"),
    "exact": ("fp16", "fp32"),
}


def parse_spec(text):
    """`exact` or `rotundaN[:name=value,...]`."""
    name, _, options = text.partition(":")
    if name == "exact":
        return EXACT
    if name not in ("rotunda2", "rotunda3", "rotunda4"):
        raise SystemExit(f"spec: got {name!r}, expected exact, rotunda2, rotunda3 or rotunda4")
    values = {"bits": int(name[-1])}
    fields = {f.name: f.type for f in dataclasses.fields(Settings) if f.name != "bits"}
    for option in filter(None, options.split(",")):
        key, _, value = option.partition("=")
        if key not in fields:
            raise SystemExit(f"spec: unknown option {key!r} of {text!r}, expected one of {', '.join(fields)}")
        if key in CHOICES and value not in CHOICES[key]:
            raise SystemExit(f"spec: {key}={value}, expected {' or '.join(CHOICES[key])}")
        values[key] = 1.0 if (key, value) == ("shift_pairs", "all") else fields[key](value)
    if not 1 <= values.get("feedback_steps", 1) <= len(FEEDBACK_TRIES):
        raise SystemExit(f"spec: feedback_steps={values['feedback_steps']}, expected 1 to {len(FEEDBACK_TRIES)}")
    return Settings(**values)


# ---------------------------------------------------------------------------------------------------------------------
# Quantizer

# Steps tried for a token, in units of its root mean square: first, last, count.
STEPS = {2: (0.40, 0.65, 6), 3: (0.20, 0.36, 5), 4: (0.10, 0.22, 5)}


def round_to_codes(y, step, bits):
    """The odd integers c in {-(2^bits - 1), ..., 2^bits - 1} with step c nearest to y."""
    levels = 2**bits
    return 2 * (y * (0.5 / step) + levels // 2).floor().clamp(0, levels - 1) - (levels - 1)


def search_codes(y, bits):
    """Codes of least squared error over the candidate steps, and the step that won. y [..., d] -> c [..., d], step [..., 1]."""
    first, last, count = STEPS[bits]
    rms = y.square().mean(-1, keepdim=True).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    best = best_codes = best_step = None
    for i in range(count):
        step = (first + i * (last - first) / (count - 1)) * rms
        codes = round_to_codes(y, step, bits)
        gain = (y * codes).sum(-1, keepdim=True).square() / codes.square().sum(-1, keepdim=True)  # |y|^2 - least squared error
        if best is None:
            best, best_codes, best_step = gain, codes, step
        else:
            better = gain > best
            best = torch.where(better, gain, best)
            best_codes = torch.where(better, codes, best_codes)
            best_step = torch.where(better, step, best_step)
    return best_codes, best_step


def scale_of(y, codes, rule):
    """[..., 1]: unbiased keeps y . (s c) = y . y, least_squares is nearest."""
    yc = (y * codes).sum(-1, keepdim=True)
    return y.square().sum(-1, keepdim=True) / yc if rule == "unbiased" else yc / codes.square().sum(-1, keepdim=True)


def stored_scale(y, codes, rule):
    """The same in fp16; 0 where y is 0, else above it."""
    s = scale_of(y, codes, rule).half().float().clamp_min(2.0**-24)
    return torch.where(y.square().sum(-1, keepdim=True) > 0, s, torch.zeros_like(s))


def feed_back(y, codes, step, bits, factor, rule):
    """Codes by sequential rounding: the error of channel i moves the channels after it.

    y, codes [heads, T, d], step [heads, T, 1], factor [heads, d, d] upper triangular (`feedback_factor`). Codes are chosen at `step`,
    errors taken with the scale of the given codes. Also what queries see of the error, [heads, T, 1]: the sum of the errors' squares.
    """
    rest = y.transpose(1, 2).contiguous()  # [heads, d, T]: a channel of all tokens lies together
    step, scale = step.transpose(1, 2), scale_of(y, codes, rule).transpose(1, 2)
    out, cost = torch.empty_like(rest), torch.zeros_like(scale)
    for i in range(rest.shape[1]):
        x = rest[:, i : i + 1]
        out[:, i : i + 1] = c = round_to_codes(x, step, bits)
        error = (x - scale * c) / factor[:, i, i, None, None]
        cost += error.square()
        rest[:, i + 1 :] -= factor[:, i, i + 1 :, None] * error
    return out.transpose(1, 2), cost.transpose(1, 2)


def codes_with_feedback(y, codes, step, bits, factor, s):
    """The codes that feedback makes of y, of several tries those of least cost; where they point away from y, those given stay."""
    fed = least = None
    for divisor in FEEDBACK_TRIES[: s.feedback_steps]:
        tried = step / divisor
        new, cost = feed_back(y, round_to_codes(y, tried, bits), tried, bits, factor, s.feedback_scale)
        fed = new if fed is None else torch.where(cost < least, new, fed)
        least = cost if least is None else torch.minimum(cost, least)
    return torch.where((y * fed).sum(-1, keepdim=True) > 0, fed, codes)


def quantize(y, bits, s, factor=None):
    """y [heads, T, d] coded with one fp16 scale per token, and back; with feedback where a factor [heads, d, d] is given."""
    codes, step = search_codes(y, bits)
    if factor is not None:
        codes = codes_with_feedback(y, codes, step, bits, factor, s)
    return stored_scale(y, codes, s.scale) * codes


# ---------------------------------------------------------------------------------------------------------------------
# What is derived from weights or from calibration, all in fp64


@dataclasses.dataclass
class Moments:
    """Second moments of one layer's queries and first and second moments of its keys before RoPE, per kv head."""

    qq: torch.Tensor  # [Hkv, d, d] mean over query heads of E[q q^T]
    k_mean: torch.Tensor  # [Hkv, d]
    k_var: torch.Tensor  # [Hkv, d] diagonal of the covariance

    def key_energy(self, mu):
        """E[(k - mu)^2], [Hkv, d]."""
        return self.k_var + (self.k_mean - mu).square()


def weight_moments(attention, gain, n_kv_heads, head_dim):
    """Moments before RoPE if the normed hidden states were white: x = g z with E[z z^T] = I and E[z] = 0."""
    gain = gain.double()

    def project(linear):
        w = (linear.weight.double() * gain).view(-1, head_dim, gain.numel())  # [heads, d, hidden]
        bias = torch.zeros(w.shape[:2], dtype=torch.float64) if linear.bias is None else linear.bias.double().view(-1, head_dim)
        return w @ w.transpose(1, 2), bias

    q_cov, q_bias = project(attention.q_proj)
    qq = q_cov + q_bias[:, :, None] * q_bias[:, None, :]
    k_cov, k_bias = project(attention.k_proj)
    return Moments(qq.view(n_kv_heads, -1, head_dim, head_dim).mean(1), k_bias, k_cov.diagonal(dim1=1, dim2=2))


def pair_sums(energy):
    """[..., d] -> [..., d]: each channel gets the sum over its RoPE pair (channels i and i + d/2)."""
    low, high = energy.chunk(2, -1)
    return torch.cat([low + high, low + high], -1)


def balance(moments, mu):
    """lambda [Hkv, d]: (E q^2 / E (k - mu)^2)^(1/4) by pair; 1 where either is 0."""
    q = pair_sums(moments.qq.diagonal(dim1=1, dim2=2))
    k = pair_sums(moments.key_energy(mu))
    return torch.where((q > 0) & (k > 0), q / k, torch.ones_like(q)).pow(0.25)


def keep_pairs(mu, scales, share):
    """mu with only the fewest RoPE pairs per kv head that hold `share` of the energy of mu L; share 1 keeps all.

    The energy is that of the balanced mu, so that the choice does not depend on how a model splits magnitude between q and k.
    """
    if share >= 1:
        return mu
    half = mu.shape[-1] // 2
    energy = pair_sums((mu * scales).square())[:, :half]
    order = energy.argsort(dim=1, descending=True, stable=True)
    ordered = energy.gather(1, order)
    before = ordered.cumsum(1) - ordered  # a pair is kept while those before it hold less than the share
    kept = torch.zeros_like(energy, dtype=torch.bool).scatter_(1, order, before < share * energy.sum(1, keepdim=True))
    return torch.where(torch.cat([kept, kept], 1), mu, torch.zeros_like(mu))


def mean_phase(angle, n):
    """Mean of e^(j m angle) over m = 0 .. n - 1 (complex, any shape); n = inf: 1 where angle is 0, else 0."""
    if math.isinf(n):
        return (angle == 0).to(torch.complex128)
    half = angle / 2
    sin = half.sin()
    ratio = torch.where(sin.abs() < 1e-12, torch.ones_like(sin), (n * half).sin() / (n * torch.where(sin == 0, torch.ones_like(sin), sin)))
    return torch.polar(ratio.abs(), (n - 1) * half + torch.where(ratio < 0, math.pi, 0.0))


def average_over_positions(qq, frequencies, n):
    """E[(q R_m)(q R_m)^T] averaged over positions m = 0 .. n - 1, from qq = E[q q^T] [Hkv, d, d] before RoPE.

    With z_i = q_i + j q_(i + d/2), RoPE is z_i e^(j m w_i): the covariance E[z_i conj(z_j)] turns by e^(j m (w_i - w_j)) and the
    pseudo-covariance E[z_i z_j] by e^(j m (w_i + w_j)).
    """
    half = qq.shape[-1] // 2
    aa, ab, bb = qq[:, :half, :half], qq[:, :half, half:], qq[:, half:, half:]
    ba = ab.transpose(1, 2)
    w = frequencies.double()
    covariance = torch.complex(aa + bb, ba - ab) * mean_phase(w[:, None] - w[None, :], n)
    pseudo = torch.complex(aa - bb, ba + ab) * mean_phase(w[:, None] + w[None, :], n)
    plus, minus = pseudo + covariance, pseudo - covariance
    top = torch.cat([plus.real, minus.imag], 2)
    bottom = torch.cat([plus.imag, -minus.real], 2)
    return torch.cat([top, bottom], 1) / 2


def feedback_factor(qq, scales, damping):
    """Upper Cholesky factor U [Hkv, d, d] of (S + damping mean(diag S) I)^-1, S = H (L^-1 qq L^-1) H; qq after RoPE."""
    h = hadamard(qq.shape[-1]).double()
    s = h @ (qq / (scales[:, :, None] * scales[:, None, :])) @ h
    s = (s + s.transpose(1, 2)) / 2
    mean = s.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    eye = torch.eye(qq.shape[-1], dtype=torch.float64)
    s = s + torch.where(mean > 0, damping * mean, torch.ones_like(mean)) * eye
    return torch.linalg.cholesky(torch.linalg.inv(s), upper=True)


@dataclasses.dataclass
class Derived:
    """One layer's constants of the settings in use, fp32."""

    mu: torch.Tensor  # [Hkv, d] subtracted before RoPE
    scales: torch.Tensor  # [Hkv, d] lambda
    factor: torch.Tensor  # [Hkv, d, d], or None


# ---------------------------------------------------------------------------------------------------------------------
# Attention


class FakeQuantAttention(nn.Module):
    """LLaMA or Qwen2 attention whose keys and values pass through the settings; takes over the projections of the given module."""

    def __init__(self, attention, config, shared):
        super().__init__()
        self.q_proj, self.k_proj = attention.q_proj, attention.k_proj
        self.v_proj, self.o_proj = attention.v_proj, attention.o_proj
        self.n_kv_heads, self.n_heads = config.num_key_value_heads, config.num_attention_heads
        self.head_dim = self.q_proj.out_features // self.n_heads
        self.layer = attention.layer_idx
        self.shared = shared  # the Reference: settings, derived constants, per-call records
        self.sink_tokens = None  # set by the layer's pre-hook

    def _quantize_values(self, v):
        h = hadamard(self.head_dim)
        s = self.shared.settings
        return quantize(v @ h, s.values, s) @ h

    def _attend(self, q, k, v, k_hat, v_hat, recent):
        """Causal attention [T, Hq * d]: query i sees k, v of tokens j > i - recent and k_hat, v_hat of the others.

        q [Hq, T, d] and the others [Hkv, T, d] after RoPE.
        """
        n_heads, n_tokens, head_dim = q.shape
        out = torch.empty(n_tokens, n_heads, head_dim)
        q = q / math.sqrt(head_dim)
        block = 256
        for begin in range(0, n_tokens, block):
            end = min(begin + block, n_tokens)
            index = torch.arange(begin, end)[:, None]
            future = torch.arange(begin, end)[None, :] > index
            near = max(0, begin - recent + 1)  # no query of the block sees an exact token before this one
            exact = (index - torch.arange(near, end)[None, :]) < recent
            for head in range(n_heads):
                g = head * k.shape[0] // n_heads
                query = q[head, begin:end]
                scores = query @ k_hat[g, :end].T
                if recent:
                    scores[:, near:] = torch.where(exact, query @ k[g, near:end].T, scores[:, near:])
                scores[:, begin:].masked_fill_(future, -torch.inf)
                p = scores.softmax(-1)
                o = p @ v_hat[g, :end]
                if recent:
                    o += (p[:, near:] * exact) @ (v[g, near:end] - v_hat[g, near:end])
                out[begin:end, head] = o
        return out.flatten(1)

    def forward(self, hidden_states, position_embeddings, **_):
        s = self.shared.settings
        n_tokens = hidden_states.shape[1]
        x = hidden_states[0]
        cos, sin = position_embeddings
        rope = lambda t: apply_rotary_pos_emb(t[None], t[None], cos, sin)[0][0]
        heads = lambda t, n: t.view(n_tokens, n, self.head_dim).transpose(0, 1)
        q = rope(heads(self.q_proj(x), self.n_heads))  # [Hq, T, d]
        k = heads(self.k_proj(x), self.n_kv_heads)
        v = heads(self.v_proj(x), self.n_kv_heads)
        if self.shared.calibration is not None:
            self.shared.calibration[self.layer].add(q, k)

        if s.bits == 16:
            k_hat, v_hat = rope(k), v
            out = self._attend(q, k_hat, v, k_hat, v, 0)
        else:
            derived = self.shared.derived[self.layer]
            mu, scales = derived.mu[:, None, :], derived.scales[:, None, :]
            h = hadamard(self.head_dim)
            y = rope((k - mu) * scales) @ h
            k_hat = (quantize(y, s.bits, s, derived.factor) @ h) / scales + rope(mu.expand_as(k))
            v_hat = self._quantize_values(v)
            k = rope(k)
            if s.exact == "fp16":  # as a cache keeps them: keys balanced and after RoPE, values rotated
                k, v = (k * scales).half().float() / scales, (v @ h).half().float() @ h
            always = torch.arange(min(s.first, n_tokens))
            if s.sinks:
                always = torch.cat([always, self.sink_tokens]).unique()
            k_hat[:, always], v_hat[:, always] = k[:, always], v[:, always]
            out = self._attend(q, k, v, k_hat, v_hat, s.recent)
        out = self.o_proj(out)
        if self.shared.records is not None:
            self.shared.records[self.layer] = dict(k_hat=k_hat, v_hat=v_hat, out=out)
        return out[None], None


class CalibrationSums:
    """Sums over calibration tokens of one layer: queries after RoPE (pooled over positions and heads), keys before RoPE."""

    def __init__(self, n_kv_heads, head_dim):
        self.qq = torch.zeros(n_kv_heads, head_dim, head_dim, dtype=torch.float64)
        self.k = torch.zeros(n_kv_heads, head_dim, dtype=torch.float64)
        self.kk = torch.zeros(n_kv_heads, head_dim, dtype=torch.float64)
        self.n_queries = self.n_tokens = 0

    def add(self, q, k):
        grouped = q.reshape(k.shape[0], -1, k.shape[2]).double()  # [Hkv, heads of the group * T, d]
        self.qq += grouped.transpose(1, 2) @ grouped
        self.k += k.double().sum(1)
        self.kk += k.double().square().sum(1)
        self.n_queries += grouped.shape[1]
        self.n_tokens += k.shape[1]

    def moments(self):
        mean = self.k / self.n_tokens
        return Moments(self.qq / self.n_queries, mean, self.kk / self.n_tokens - mean.square())


class Reference:
    """A model with fake-quantized attention. Call `use`, then `logits`; `calibrate` fills `calibrated`."""

    def __init__(self, folder):
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        self.config = self.model.config
        self.settings = EXACT
        self.derived = None  # Derived per layer
        self.calibrated = None  # Moments per layer; qq after RoPE
        self.calibration = None  # CalibrationSums per layer while calibrating
        self.records = None  # dict per layer of the last call, when not None
        for layer in self.model.model.layers:
            layer.self_attn = FakeQuantAttention(layer.self_attn, self.config, self)
            layer.register_forward_pre_hook(self._find_sinks, with_kwargs=True)

    def _find_sinks(self, layer, args, kwargs):
        hidden = (args[0] if args else kwargs["hidden_states"])[0]  # [T, hidden]
        if self.settings.sinks:
            top = hidden.abs().flatten().topk(min(self.settings.sinks, hidden.numel())).indices
            layer.self_attn.sink_tokens = (top // hidden.shape[1]).unique()

    def use(self, settings):
        """Derives everything the settings need from weights or calibration."""
        resolved = dataclasses.replace(settings)
        if resolved.values is None:
            resolved.values = resolved.bits
        if resolved.positions is None:
            resolved.positions = min(self.config.max_position_embeddings, 4096)
        self.settings = resolved
        if resolved.bits == 16:
            self.derived = None
        else:
            if resolved.needs_calibration() and self.calibrated is None:
                raise SystemExit("these settings need --calibration")
            self.derived = [self._derive(resolved, i) for i in range(self.config.num_hidden_layers)]

    @torch.no_grad()
    def _derive(self, s, index):
        layer = self.model.model.layers[index]
        attention = layer.self_attn
        weights = weight_moments(attention, layer.input_layernorm.weight, attention.n_kv_heads, attention.head_dim)
        calibrated = self.calibrated[index] if self.calibrated else None
        mu = {"none": lambda: torch.zeros_like(weights.k_mean), "bias": lambda: weights.k_mean, "mean": lambda: calibrated.k_mean}[s.shift]()
        if s.balance == "none":
            balanced_by = lambda mu: torch.ones_like(mu)
        elif s.balance == "weights":
            # Of the mean, weights know the bias only; where the calibrated one is subtracted, it is what mu falls short of.
            known = dataclasses.replace(weights, k_mean=calibrated.k_mean) if s.shift == "mean" else weights
            balanced_by = lambda mu: balance(known, mu)
        else:
            balanced_by = lambda mu: balance(calibrated, mu)
        mu = keep_pairs(mu, balanced_by(mu), s.shift_pairs)
        scales = balanced_by(mu)
        factor = None
        if s.feedback == "weights":
            qq = average_over_positions(weights.qq, self.model.model.rotary_emb.inv_freq, s.positions)
            factor = feedback_factor(qq, scales, s.damping).float()
        elif s.feedback == "calibrated":
            factor = feedback_factor(calibrated.qq, scales, s.damping).float()
        return Derived(mu.float(), scales.float(), factor)

    @torch.no_grad()
    def hidden(self, ids):
        """Final normed hidden states [T, hidden] of one sequence."""
        return self.model.model(input_ids=torch.tensor([ids]), use_cache=False)[0][0]

    @torch.no_grad()
    def log_probs(self, ids):
        """Log probabilities [T - 1, vocabulary] of the token after each but the last."""
        return self.model.lm_head(self.hidden(ids)[:-1]).log_softmax(-1)

    def nll(self, ids):
        """Negative log likelihood [T - 1] of every token but the first."""
        return -self.log_probs(ids).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]

    def calibrate(self, windows):
        """Moments of queries and keys of the exact model over the windows."""
        self.use(EXACT)
        first = self.model.model.layers[0].self_attn
        self.calibration = [CalibrationSums(first.n_kv_heads, first.head_dim) for _ in range(self.config.num_hidden_layers)]
        for ids in windows:
            self.hidden(ids)
        self.calibrated, self.calibration = [sums.moments() for sums in self.calibration], None


# ---------------------------------------------------------------------------------------------------------------------
# Protocols


class Comparison:
    """Perplexity of one spec, and KL and top-1 agreement against the exact model, over windows added one by one."""

    def __init__(self):
        self.nll = self.kl = 0.0
        self.same = self.count = 0

    @torch.no_grad()
    def add(self, ids, exact, log_probs):
        targets = torch.tensor(ids[1:])
        self.nll -= log_probs.gather(1, targets[:, None]).double().sum().item()
        for a, b in zip(exact.split(256), log_probs.split(256)):
            self.kl += (a.exp() * (a - b)).sum(-1).double().sum().item()
            self.same += (a.argmax(-1) == b.argmax(-1)).sum().item()
        self.count += len(targets)

    def result(self, exact_ppl=None):
        ppl = math.exp(self.nll / self.count)
        out = {"ppl": ppl, "kl": self.kl / self.count, "top1": self.same / self.count}
        return out | ({"change_percent": 100 * (ppl / exact_ppl - 1)} if exact_ppl else {})


def compare(reference, windows, settings, progress=None):
    """Results of every settings over the same windows, behind the exact model's perplexity."""
    exact_total = Comparison()
    totals = [Comparison() for _ in settings]
    for i, ids in enumerate(windows):
        reference.use(EXACT)
        exact = reference.log_probs(ids)
        exact_total.add(ids, exact, exact)
        for j, (one, total) in enumerate(zip(settings, totals)):
            reference.use(one)
            total.add(ids, exact, reference.log_probs(ids))
            if progress:
                progress(i, j, total.result(exact_total.result()["ppl"]))
    ppl = exact_total.result()["ppl"]
    return ppl, [total.result(ppl) for total in totals]


# ---------------------------------------------------------------------------------------------------------------------
# Goldens


GOLDEN_WINDOW = 2048
GOLDEN_CALIBRATION_WINDOWS = 8
GOLDEN_SHORT = 40

CALIBRATED = "shift=mean,balance=calibrated,feedback=calibrated"
GOLDEN_SPECS = {
    "exact": "exact",
    "rotunda2": "rotunda2",
    "rotunda2-feedback-none": "rotunda2:feedback=none",
    "rotunda2-plain": "rotunda2:balance=none,feedback=none",
    "rotunda2-recent0": "rotunda2:recent=0",
    "rotunda2-first0": "rotunda2:first=0",
    "rotunda2-sinks20": "rotunda2:sinks=20",
    "rotunda2-least-squares": "rotunda2:scale=least_squares",
    "rotunda2-values4": "rotunda2:values=4",
    "rotunda3": "rotunda3",
    "rotunda3-recent0": "rotunda3:recent=0",
    "rotunda4": "rotunda4",
    "rotunda4-recent0": "rotunda4:recent=0",
    "rotunda2-calibrated": f"rotunda2:{CALIBRATED}",
    "rotunda2-calibrated-all-pairs": f"rotunda2:{CALIBRATED},shift_pairs=all",
}


def layer_constants(derived):
    """What layer 0 is set up with, for a test that need not run the model."""
    half = derived.scales.shape[1] // 2
    out = {"lambda": [rounded(row[:half]) for row in derived.scales], "mu": [rounded(row) for row in derived.mu]}
    if derived.factor is not None:
        u = derived.factor / derived.factor.diagonal(dim1=1, dim2=2)[:, :, None]
        out["feedback_row0"] = [rounded(head[0]) for head in u]
        out["feedback_square_sums"] = [rounded(head.double().triu(1).square().sum(1).float(), 6) for head in u]
    return out


def make_golden(reference, tokenizer, text, calibration_text, progress):
    """The content of tests/golden/rotunda_tiny_gqa.json; the fields are documented in it under "about"."""
    config = reference.config
    window = windows_of(tokenizer.encode(text), GOLDEN_WINDOW, config.bos_token_id, 1)[0]
    calibration = windows_of(
        tokenizer.encode(calibration_text), config.max_position_embeddings, config.bos_token_id, GOLDEN_CALIBRATION_WINDOWS
    )
    reference.calibrate(calibration)
    exact = reference.log_probs(window)
    variants = {}
    for name, spec in GOLDEN_SPECS.items():
        reference.use(parse_spec(spec))
        total = Comparison()
        log_probs = reference.log_probs(window)
        total.add(window, exact, log_probs)
        nll = -log_probs.gather(1, torch.tensor(window[1:])[:, None])[:, 0].double()
        entry = {"spec": spec, "settings": dataclasses.asdict(reference.settings)}
        entry["mean_nll"] = round(nll.mean().item(), 6)
        entry["mean_nll_first_256"] = round(nll[:256].mean().item(), 6)
        entry |= {key: round(total.result()[key], 6) for key in ("kl", "top1")}
        if reference.derived:
            entry["layer0"] = layer_constants(reference.derived[0])
        if reference.settings.recent == 0:
            reference.records = {}
            short = reference.nll(window[:GOLDEN_SHORT])
            first, reference.records = reference.records[0], None
            entry["short"] = {
                "nll": rounded(short),
                "layer0_k_hat_token39": rounded(first["k_hat"][:, -1]),
                "layer0_v_hat_token39": rounded(first["v_hat"][:, -1]),
                "layer0_out_norm": rounded(first["out"].norm(dim=-1)),
            }
        variants[name] = entry
        progress(f"{name}: mean nll {entry['mean_nll']}, KL {entry['kl']}")
    return {
        "about": {
            "window": "ids of the first window of the text: BOS and 2047 tokens; mean_nll, kl and top1 are over its last 2047 ids",
            "calibration": "ids of the calibration windows one after the other, each BOS and trained context - 1 tokens",
            "settings": "recent: query i sees keys j > i - recent exactly; first: tokens at the start that all see exactly; sinks: "
            "largest |hidden| entries of a layer's input, over the whole window; exact tokens as balanced keys after RoPE and rotated values in fp16",
            "layer0": "lambda [kv head][pair]; mu [kv head][channel], before balance; feedback_row0 [kv head][j] U_0j / U_00; "
            "feedback_square_sums [kv head][i] the sum of (U_ij / U_ii)^2 over j > i",
            "short": "the first 40 ids of the window alone: k_hat after RoPE (balance undone) and v_hat (rotated back) of the last token, "
            "[kv head][channel]; out: the attention block's result after o_proj",
        },
        "window": window,
        "calibration": {
            "windows": len(calibration),
            "window_len": config.max_position_embeddings,
            "text_sha256": hashlib.sha256(calibration_text.encode()).hexdigest(),
            "ids": sum(calibration, []),
        },
        "variants": variants,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    ppl = commands.add_parser("ppl", help="perplexity, KL and top-1 against the exact model over non-overlapping windows")
    task = commands.add_parser("task", help="teacher-forced exact match over JSON lines {prompt, [solution], answer}")
    golden = commands.add_parser("golden", help="write the goldens of the C++ tests")
    for command in (ppl, task, golden):
        command.add_argument("--model", required=True)
        command.add_argument("--threads", type=int, default=1)
    for command in (ppl, task):
        command.add_argument("--spec", action="append", required=True, help="exact or rotundaN[:name=value,...]; may be repeated")
        command.add_argument("--calibration", help="text file; needed by calibrated options and shift=mean")
        command.add_argument("--calibration-windows", type=int, default=16, help="of the trained context")
    ppl.add_argument("--text", required=True)
    ppl.add_argument("--windows", type=int, default=24)
    ppl.add_argument("--window-len", type=int, help="default: the trained context")
    task.add_argument("--jsonl", required=True)
    task.add_argument("--lines", type=int, default=100)
    golden.add_argument("--text", required=True)
    golden.add_argument("--calibration", required=True)
    golden.add_argument("--out", required=True)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    reference, tokenizer = Reference(args.model), Tokenizer(args.model)
    bos, context = reference.config.bos_token_id, reference.config.max_position_embeddings
    start = time.time()
    progress = lambda line: print(f"{time.time() - start:6.0f} s  {line}", file=sys.stderr, flush=True)

    if args.command == "golden":
        result = make_golden(reference, tokenizer, read_text(args.text), read_text(args.calibration), progress)
        pathlib.Path(args.out).write_text(json.dumps(result, separators=(",", ":")) + "\n")
        return

    settings = [parse_spec(text) for text in args.spec]
    if any(one.needs_calibration() for one in settings):
        if not args.calibration:
            parser.error("these specs need --calibration")
        ids = tokenizer.encode(read_text(args.calibration))
        windows = windows_of(ids, context, bos, args.calibration_windows)
        if not windows:
            parser.error(f"--calibration: got {len(ids)} tokens, expected at least {context - 1}")
        reference.calibrate(windows)
        progress(f"calibrated on {len(windows)} windows")
    if args.command == "ppl":
        windows = windows_of(tokenizer.encode(read_text(args.text)), args.window_len or context, bos, args.windows)
        show = lambda i, j, r: progress(f"window {i + 1}, {args.spec[j]}: {r['change_percent']:+.2f} %, KL {r['kl']:.4f}, top-1 {r['top1']:.3f}")
        exact_ppl, results = compare(reference, windows, settings, show)
        for text, result in zip(args.spec, results):
            print(json.dumps({"spec": text, "windows": len(windows), "exact_ppl": exact_ppl} | result))
        return
    lines = [json.loads(line) for line in read_text(args.jsonl).splitlines()[: args.lines]]
    for text, one in zip(args.spec, settings):
        reference.use(one)
        right = 0
        for i, line in enumerate(lines):
            prompt_ids, answer_ids = task_ids(tokenizer, line)
            right += exact_match(reference, [bos] + prompt_ids, answer_ids)
            progress(f"{text}, line {i + 1}: {right} right")
        print(json.dumps({"spec": text, "lines": len(lines), "exact_match": right / len(lines)}))


if __name__ == "__main__":
    main()
