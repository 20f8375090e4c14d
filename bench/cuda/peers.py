#!/usr/bin/env python3
"""What others reach on the same GPU: FlashInfer's decode attention, and a whole decode step of compiled transformers.

    python3 bench/cuda/peers.py attention [--json FILE] [--shape NAME]...
    python3 bench/cuda/peers.py step [--json FILE] [--shape NAME]... [--mode reduce-overhead]

`attention` needs flashinfer, which compiles its kernels on first use; shapes, check and timing are those of attention_cuda: the first
sequence against fp32 arithmetic over the stored values, then medians of CUDA events, L2 flushed before each. `step` needs transformers:
random weights, one sequence, a static cache, greedy; the time from one token to the next. docs/benchmarks.md says how to install both.
"""

import argparse
import json
import math
import time

import torch

# ---- attention -------------------------------------------------------------------------------------------------------

# batch, kv_len, n_heads, n_kv_heads; as in attention_cuda.cpp
ATTENTION_SHAPES = {
    "llama3-8b-8x32k": (8, 32768, 32, 8),
    "llama3-8b-1x128k": (1, 131072, 32, 8),
    "llama3-8b-64x4k": (64, 4096, 32, 8),
    "llama2-13b-8x4k": (8, 4096, 40, 40),
    "llama3-8b-1x4k": (1, 4096, 32, 8),
}
HEAD_DIM = 128
FLUSH_BYTES = 256 << 20  # several times L2
WORKSPACE_BYTES = 512 << 20
TYPES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


def summary(times):
    """Median, and what a tenth of the times lies below and above."""
    times = sorted(times)
    return {"median_ms": times[len(times) // 2], "low_ms": times[len(times) // 10], "high_ms": times[-1 - len(times) // 10]}


def event():
    return torch.cuda.Event(enable_timing=True)


class Timer:
    """Times of a launch, replayed as a CUDA graph: what Python and FlashInfer's wrapper cost on the host is not counted."""

    def __init__(self, repetitions):
        self.repetitions = repetitions
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def __call__(self, launch):
        for _ in range(3):
            launch()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch()
        graph.replay()
        times = []
        for i in range(self.repetitions):
            begin, end = event(), event()
            self.flush.fill_(i)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        return summary(times)


class Pages:
    """Keys and values of one shape in pages of one size and type, a sequence's pages anywhere in the pool as in a real one."""

    def __init__(self, shape, kv_type, page_size):
        self.batch, self.kv_len, self.n_heads, self.n_kv_heads = shape
        self.page_size = page_size
        self.kv_type = TYPES[kv_type]
        generator = torch.Generator(device="cuda").manual_seed(1)
        self.q = torch.randn(self.batch, self.n_heads, HEAD_DIM, generator=generator, device="cuda").to(torch.bfloat16)
        pages = self.batch * self.kv_len // page_size
        # [pages, n_kv_heads, page_size, HEAD_DIM], FlashInfer's "HND"
        pool = (pages, self.n_kv_heads, page_size, HEAD_DIM)
        self.k, self.v = (torch.randn(pool, dtype=torch.bfloat16, generator=generator, device="cuda").to(self.kv_type) for _ in range(2))
        self.table = torch.randperm(pages, generator=generator, device="cuda").int().view(self.batch, -1)

    def bytes(self):
        return 2 * self.k.numel() * self.k.element_size()

    def first_exact(self):
        """Attention of the first sequence in fp32, [n_heads, HEAD_DIM]."""
        of = self.table[0].long()
        k, v = (x[of].float().transpose(0, 1).flatten(1, 2) for x in (self.k, self.v))  # [n_kv_heads, kv_len, HEAD_DIM]
        q = self.q[0].float().view(self.n_kv_heads, -1, HEAD_DIM) / math.sqrt(HEAD_DIM)
        return (torch.softmax(q @ k.transpose(1, 2), -1) @ v).flatten(0, 1)


def wrapper_launch(pages, out, tensor_cores, backend):
    """BatchDecodeWithPagedKVCacheWrapper, planned once."""
    import flashinfer

    workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=tensor_cores, backend=backend)
    per_sequence = pages.kv_len // pages.page_size
    wrapper.plan(
        torch.arange(pages.batch + 1, dtype=torch.int32) * per_sequence, pages.table.flatten(),
        torch.full((pages.batch,), pages.page_size, dtype=torch.int32), pages.n_heads, pages.n_kv_heads, HEAD_DIM, pages.page_size,
        q_data_type=torch.bfloat16, kv_data_type=pages.kv_type)
    return lambda: wrapper.run(pages.q, (pages.k, pages.v), out=out)


def xqa_launch(pages, out):
    """XQA, what trtllm_batch_decode_with_kv_cache chooses on Hopper."""
    import flashinfer.decode

    workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
    lengths = torch.full((pages.batch,), pages.kv_len, dtype=torch.int32, device="cuda")
    return lambda: flashinfer.decode.xqa_batch_decode_with_kv_cache(
        pages.q, (pages.k, pages.v), workspace, pages.table, lengths, pages.kv_len, bmm1_scale=1 / math.sqrt(HEAD_DIM), bmm2_scale=1.0,
        kv_layout="HND", out=out)


KERNELS = {
    "cuda cores": lambda pages, out: wrapper_launch(pages, out, False, "auto"),
    "tensor cores fa2": lambda pages, out: wrapper_launch(pages, out, True, "fa2"),
    "tensor cores fa3": lambda pages, out: wrapper_launch(pages, out, True, "fa3"),
    "xqa": xqa_launch,
}
FA3_TYPES = ("bf16",)  # its fp8 wants queries in fp8 too


def attention(args):
    import flashinfer

    timer = Timer(args.repetitions)
    report = {"flashinfer": flashinfer.__version__, "repetitions": args.repetitions, "rows": []}
    for shape in args.shape or ATTENTION_SHAPES:
        print(f"\n{shape}\n{'':34} {'ms':>9} {'(10 to 90 %)':>17} {'GB/s':>8} {'error':>9}")
        for kv_type in TYPES:
            for page_size in args.page_size:
                pages = Pages(ATTENTION_SHAPES[shape], kv_type, page_size)
                exact = pages.first_exact()
                for kernel, prepare in KERNELS.items():
                    if kernel == "tensor cores fa3" and kv_type not in FA3_TYPES:
                        continue
                    name = f"{kernel}, {kv_type}, pages of {page_size}"
                    out = torch.full_like(pages.q, math.nan)
                    try:
                        launch = prepare(pages, out)
                        launch()
                    except (RuntimeError, ValueError, NotImplementedError) as error:
                        print(f"{name:34} refused: {str(error).strip().splitlines()[0][:200]}", flush=True)
                        report["rows"].append({"shape": shape, "kernel": name, "refused": str(error)[:2000]})
                        continue
                    error = ((out[0].float() - exact).norm() / exact.norm()).item()
                    row = {"shape": shape, "kernel": name, **timer(launch), "relative_error": error}
                    row["gb_s"] = pages.bytes() / row["median_ms"] * 1e-6
                    report["rows"].append(row)
                    print(f"{name:34} {row['median_ms']:9.4f} ({row['low_ms']:7.4f} {row['high_ms']:7.4f}) {row['gb_s']:8.0f} {error:9.1e}",
                          flush=True)
    return report


# ---- step ------------------------------------------------------------------------------------------------------------

# hidden, layers, heads, kv heads, feed-forward, vocabulary, RoPE base, type: as the models of these names have them
STEP_SHAPES = {
    "llama3-8b": (4096, 32, 32, 8, 14336, 128256, 500000.0, torch.bfloat16),
    "llama2-13b": (5120, 40, 40, 40, 13824, 32000, 10000.0, torch.float16),
}
PROMPT_TOKENS, CACHE_TOKENS, WARM_STEPS, TIMED_STEPS = 128, 256, 8, 64


def random_model(shape):
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, layers, heads, kv_heads, ffn, vocabulary, theta, dtype = STEP_SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads, intermediate_size=ffn,
        vocab_size=vocabulary, rope_parameters={"rope_type": "default", "rope_theta": theta}, max_position_embeddings=8192,
        rms_norm_eps=1e-5, attn_implementation="sdpa")
    torch.manual_seed(1)
    torch.set_default_dtype(dtype)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    return model


def step_times(model, step):
    """Prompt, then steps. Returns the logits of the first step [vocabulary], its seconds, and the milliseconds of the timed steps."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=CACHE_TOKENS)
    prompt = torch.arange(PROMPT_TOKENS, device="cuda").view(1, -1) * 97 % model.config.vocab_size
    token = model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
    began = time.time()
    logits, following = step(token, cache)
    first = logits.float().clone()
    token = following.clone()  # a step's results lie where the next step's will
    first_seconds = time.time() - began
    marks = []
    for _ in range(WARM_STEPS + TIMED_STEPS):
        marks.append(event())
        marks[-1].record()
        token = step(token, cache)[1].clone()
    marks.append(event())
    marks[-1].record()
    torch.cuda.synchronize()
    between = [a.elapsed_time(b) for a, b in zip(marks, marks[1:])]
    return first, first_seconds, between[WARM_STEPS:]


@torch.no_grad()
def step(args):
    import transformers

    report = {"transformers": transformers.__version__, "prompt_tokens": PROMPT_TOKENS, "timed_steps": TIMED_STEPS, "rows": []}
    for shape in args.shape or STEP_SHAPES:
        model = random_model(shape)
        # All that a step reads: every weight but the table of embeddings, of which it takes a row.
        weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters()) - model.model.embed_tokens.weight.nbytes
        print(f"\n{shape}: {weight_bytes * 1e-9:.2f} GB of weights a step")
        print(f"{'':34} {'ms':>9} {'(10 to 90 %)':>17} {'tokens/s':>9} {'GB/s':>8} {'differs':>9} {'first':>8}")

        def eager(token, cache):
            logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1]
            return logits, logits.argmax(-1, keepdim=True)

        exact = None
        for mode in ["eager"] + args.mode:
            torch.compiler.reset()
            run = eager if mode == "eager" else torch.compile(eager, mode=mode, fullgraph=True)
            logits, first_seconds, times = step_times(model, run)
            exact = logits if exact is None else exact
            row = {"shape": shape, "mode": mode, **summary(times), "first_step_s": first_seconds,
                   "relative_difference_from_eager": ((logits - exact).norm() / exact.norm()).item()}
            row["tok_s"] = 1e3 / row["median_ms"]
            row["weights_gb_s"] = weight_bytes / row["median_ms"] * 1e-6
            report["rows"].append(row)
            print(f"{mode:34} {row['median_ms']:9.4f} ({row['low_ms']:7.4f} {row['high_ms']:7.4f}) {row['tok_s']:9.1f} "
                  f"{row['weights_gb_s']:8.0f} {row['relative_difference_from_eager']:9.1e} {first_seconds:6.1f} s", flush=True)
        del model, run, eager
        torch.compiler.reset()
        torch.cuda.empty_cache()
    return report


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, run, shapes in (("attention", attention, ATTENTION_SHAPES), ("step", step, STEP_SHAPES)):
        command = commands.add_parser(name)
        command.add_argument("--json", help="everything, to this file")
        command.add_argument("--shape", action="append", choices=shapes)
        command.set_defaults(run=run)
        if run is attention:
            command.add_argument("--repetitions", type=int, default=30)
            command.add_argument("--page-size", type=int, action="append", default=None, help="tokens of a page; 16 and 64")
        else:
            command.add_argument("--mode", action="append", default=None, help="of torch.compile; reduce-overhead")
    args = parser.parse_args()
    if args.command == "attention":
        args.page_size = args.page_size or [16, 64]  # append adds to a default, so there is none above
    else:
        args.mode = args.mode or ["reduce-overhead"]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    report = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda, **args.run(args)}
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
