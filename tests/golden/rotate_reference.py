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
        k_rope, v = rope(k), v.transpose(0, 1)
        if s.method != "exact" and s.exact == "fp16":  # as a cache keeps them: keys after RoPE, values rotated
            w = hadamard(self.head_dim) if s.method == "rotate" else torch.eye(self.head_dim)
            k_rope, v = k_rope.half().float(), (v @ w).half().float() @ w
        if s.method != "exact" and s.rope == "post":
            k_hat = self._quantize_keys(k_rope.transpose(0, 1)).transpose(0, 1)
        out = self._attend(q, k_rope, v, k_hat, v_hat, keep)
        y = self.o_proj(out.flatten(1))
        if self.shared.records is not None:
            sinks = [] if self.sink_tokens is None else self.sink_tokens.tolist()
            self.shared.records[self.layer] = dict(k_hat=k_hat, v_hat=v_hat, sinks=sinks, out=y)
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


def task_ids(tokenizer, line):
    """Prompt and answer ids (no BOS) of one task line. The text is tokenized as a whole; the answer is what follows the prompt.

    Chain of thought (lines with a solution): " {solution} The answer is {answer}", without a final period, which a byte-level
    BPE would join with the blank line that follows in the model's training text. Retrieval: " {answer}".
    """
    solution = f" {line['solution']} The answer is" if "solution" in line else ""
    prompt_ids = tokenizer.encode(line["prompt"])
    ids = tokenizer.encode(f"{line['prompt']}{solution} {line['answer']}")
    if ids[: len(prompt_ids)] != prompt_ids:
        raise SystemExit(f"task: the prompt's ids are no prefix of the whole text's: {line['prompt'][-40:]!r}")
    return prompt_ids, ids[len(prompt_ids) :]


# ---------------------------------------------------------------------------------------------------------------------
# Goldens


GOLDEN_WINDOW = 2048
GOLDEN_CALIBRATION_WINDOWS = 4
GOLDEN_SHORT = 40


def golden_variants():
    """name -> Settings. Metadata and exact tokens in fp16, as a cache keeps them, unless the name ends in fp32."""
    real = dict(meta="fp16", exact="fp16", zero="int8")
    out = {"exact": Settings(method="exact")}
    for bits in (2, 3, 4):
        for recent in (0, 64):
            out[f"rotate{bits}-recent{recent}"] = Settings(bits=bits, recent=recent, **real)
    out["rotate2-sinks0"] = Settings(sinks=0, **real)
    out["rotate2-recent64-sinks0"] = Settings(sinks=0, recent=64, **real)
    out["rotate2-clip1"] = Settings(clip=1.0, **real)
    out["rotate2-minimum"] = Settings(**{**real, "zero": "minimum"})
    out["rotate2-recent64-minimum"] = Settings(recent=64, **{**real, "zero": "minimum"})
    # One group of 128 holds every key channel of tiny-gqa, so the order matters only in smaller groups.
    for reorder in ("layer", "none"):
        out[f"rotate2-group32-{reorder}"] = Settings(group=32, reorder=reorder, **real)
    # One head per rotation, so that a group-wise order differs from the layer's.
    for reorder in ("layer", "group"):
        out[f"rotate2-heads1-group32-{reorder}"] = Settings(group=32, heads=1, reorder=reorder, **real)
    out["rotate2-fp32"] = Settings()
    out["rotate2-recent64-fp32"] = Settings(recent=64)
    return out


def rounded(tensor, digits=7):
    return [float(f"{x:.{digits}g}") for x in tensor.flatten().tolist()]


def make_golden(reference, tokenizer, text, calibration_text, progress):
    """The content of tests/golden/rotate_tiny_gqa.json; the fields are documented in it under "about"."""
    config = reference.config
    window = windows_of(tokenizer.encode(text), GOLDEN_WINDOW, config.bos_token_id, 1)[0]
    calibration = windows_of(
        tokenizer.encode(calibration_text), config.max_position_embeddings, config.bos_token_id, GOLDEN_CALIBRATION_WINDOWS
    )
    tokens = sum(len(ids) for ids in calibration)
    sums = {}
    for heads in sorted({1, math.gcd(4, config.num_key_value_heads)}):
        reference.key_sums_heads = heads
        reference.calibrate(calibration)
        sums[heads] = reference.sums
    variants = {}
    for name, settings in golden_variants().items():
        reference.use(settings)
        resolved = reference.settings
        reference.sums = sums[resolved.heads]
        nll = reference.nll(window).double()
        reference.records = {}
        reference.hidden(window[:GOLDEN_SHORT])
        first, last = reference.records[0], reference.records[config.num_hidden_layers - 1]
        reference.records = None
        entry = {"settings": dataclasses.asdict(resolved)}
        entry["mean_nll"] = round(nll.mean().item(), 6)
        entry["mean_nll_first_256"] = round(nll[:256].mean().item(), 6)
        entry["short"] = {
            "nll": rounded(reference.nll(window[:GOLDEN_SHORT])),
            "layer0_sinks": first["sinks"] if settings.method != "exact" else [],
            "layer0_out_norm": rounded(first["out"].norm(dim=-1)),
            "layer0_out_head": [rounded(row[:4]) for row in first["out"]],
            "last_layer_out_norm": rounded(last["out"].norm(dim=-1)),
        }
        if settings.method != "exact":
            entry["short"]["layer0_k_hat_token39"] = rounded(first["k_hat"][:, -1])
            entry["short"]["layer0_v_hat_token39"] = rounded(first["v_hat"][:, -1])
        variants[name] = entry
        progress(f"{name}: mean nll {entry['mean_nll']}")
    return {
        "about": {
            "window": "ids of the first window of the text: BOS and 2047 tokens; mean_nll is over its last 2047 ids",
            "calibration": "ids of the calibration windows one after the other, each BOS and trained context - 1 tokens",
            "key_means": "heads per rotation -> layer -> signed mean of every rotated key channel (before RoPE) over calibration",
            "perm": "heads per rotation -> layer -> stable argsort of those means; r[perm] is grouped",
            "settings": "sinks: largest |hidden| entries; recent: query i sees keys j > i - recent exactly; fp16: metadata "
            "rounded before coding; exact tokens kept as keys after RoPE and rotated values in fp16; group: channels; heads: per key rotation",
            "short": "the first 40 ids of the window alone: out is the attention block's result after o_proj, per token "
            "(norm, first four values); k_hat after RoPE and v_hat (rotated back) are the last token's, [kv head][channel]",
        },
        "window": window,
        "calibration": {
            "windows": len(calibration),
            "window_len": config.max_position_embeddings,
            "text_sha256": hashlib.sha256(calibration_text.encode()).hexdigest(),
            "ids": sum(calibration, []),
        },
        "key_means": {str(h): [rounded(row / tokens, 6) for row in s] for h, s in sums.items()},
        "perm": {str(h): [row.argsort(stable=True).tolist() for row in s] for h, s in sums.items()},
        "variants": variants,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def add_settings(parser):
    parser.add_argument("--method", default="rotate", choices=["exact", "rotate", "rtn"])
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--clip", type=float, help="keys and values; default 0.8 at 2 bits, else 1; 1 for rtn")
    parser.add_argument("--clip-values", type=float)
    parser.add_argument("--group", type=int, help="channels; default 128, head_dim for rtn")
    parser.add_argument("--heads", type=int, help="kv heads in one key rotation; default gcd(4, n_kv_heads)")
    parser.add_argument("--reorder", default="layer", choices=["layer", "group", "none"])
    parser.add_argument("--zero", default="integer", choices=["integer", "int8", "code", "minimum"])
    parser.add_argument("--meta", default="fp16", choices=["fp16", "fp32"], help="precision of scale and minimum")
    parser.add_argument("--exact", default="fp32", choices=["fp16", "fp32"], help="precision of sinks and window")
    parser.add_argument("--sinks", type=int, default=20, help="largest |hidden| entries of a layer's input")
    parser.add_argument("--recent", type=int, default=0)
    parser.add_argument("--rope", default="pre", choices=["pre", "post"], help="quantize keys before or after RoPE")
    parser.add_argument("--calibration", help="text file; needed unless reorder is none")
    parser.add_argument("--calibration-windows", type=int, default=16, help="of the trained context")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    ppl = commands.add_parser("ppl", help="perplexity over non-overlapping windows")
    task = commands.add_parser("task", help="teacher-forced exact match over JSON lines {prompt, [solution], answer}")
    golden = commands.add_parser("golden", help="write the goldens of the C++ tests")
    for command in (ppl, task, golden):
        command.add_argument("--model", required=True)
        command.add_argument("--threads", type=int, default=1)
    ppl.add_argument("--text", required=True)
    ppl.add_argument("--windows", type=int, default=24)
    ppl.add_argument("--window-len", type=int, help="default: the trained context")
    add_settings(ppl)
    task.add_argument("--jsonl", required=True)
    task.add_argument("--lines", type=int, default=100)
    add_settings(task)
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
        text = json.dumps(result, separators=(",", ":"))
        pathlib.Path(args.out).write_text(text + "\n")
        return

    settings = Settings(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Settings)})
    reference.use(settings)
    if settings.method == "rotate" and settings.reorder != "none":
        if not args.calibration:
            parser.error(f"--reorder {settings.reorder} needs --calibration")
        reference.key_sums_heads = reference.settings.heads
        ids = tokenizer.encode(read_text(args.calibration))
        windows = windows_of(ids, context, bos, args.calibration_windows)
        if not windows:
            parser.error(f"--calibration: got {len(ids)} tokens, expected at least {context - 1}")
        reference.calibrate(windows)
    result = {"settings": dataclasses.asdict(reference.settings)}
    if args.command == "ppl":
        windows = windows_of(tokenizer.encode(read_text(args.text)), args.window_len or context, bos, args.windows)
        value, running = perplexity(reference, windows, lambda i, p: progress(f"window {i + 1}: ppl so far {p:.4f}"))
        result |= {"windows": len(windows), "ppl": value, "running_ppl": running}
    else:
        lines = [json.loads(line) for line in read_text(args.jsonl).splitlines()[: args.lines]]
        right = 0
        for i, line in enumerate(lines):
            prompt_ids, answer_ids = task_ids(tokenizer, line)
            right += exact_match(reference, [bos] + prompt_ids, answer_ids)
            progress(f"line {i + 1}: {right} right")
        result |= {"lines": len(lines), "exact_match": right / len(lines)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
