#!/usr/bin/env python3
"""Makes tests/golden/tokenizers/: small tokenizers of every supported shape, and what Hugging Face answers for them.

    USE_TORCH=0 python tests/golden/make_tokenizer_golden.py [--small-mha FOLDER]

Needs transformers 4.57, tokenizers 0.22, sentencepiece. `texts.json` holds the inputs (hexadecimal, some repeated);
`<name>/` a tokenizer; `<name>.json` the ids and the decoded texts, as counts and FNV-1a hashes, in full where short.
"""
import argparse
import json
import pathlib
import shutil
import sys

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaTokenizer

ROOT = pathlib.Path(__file__).resolve().parents[2]
OUT = ROOT / "tests/golden/tokenizers"
HEAD = ROOT / "assets/wikitext2_test_head.txt"

LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

TEXTS = {
    "empty": "",
    "blank": " ",
    "blanks": " " * 37,
    "lead_trail": "  two blanks before, three behind   ",
    "words": "Hello world! It's what they'll do; I'D say we've been there, HE'S not.",
    "digits": "In 1234567 days, 3.14159 and 2^10=1024, ½ ² Ⅷ ٣٤٥ १२३ 10,000",
    "newlines": "a\nb\n\nc\r\nd\r\r\n\n\n  e \n f\n   \n",
    "tabs": "\tint main() {\n\t\treturn 0;\t// x\n\t}\n\t\t\t",
    "code": "def f(x: int) -> str:\n    if x >= 10 and x != 42:\n        return f\"{x:>8}\" + '\\n'\n    # done\n",
    "json": '{"a": [1, 2.5e-3, null], "b\\u00e9": {"c": true}}',
    "latin": "Ça été naïve, Straße, Ærøskøbing, Łódź, İstanbul, ǅ ŉ",
    "nfc": "e\u0301 vs é, A\u030a vs Å vs \u212b, q\u0323\u0307 q\u0307\u0323, \u1100\u1161\u11a8 vs 각, \u0958 \ufb01 \u2126 \ufdfa",
    "marks": "Z\u0351\u036b\u0343a\u0334l\u0321\u0322g\u0328o\u0331 \u0301alone \u0e01\u0e33 \u0e19\u0e49\u0e33 क्षि நி",
    "mark_run": "a" + "\u0301\u0323\u0316\u035c" * 40,
    "emoji": "😀 👍🏽 👨‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇫🇷 ☺️ 1️⃣ ❤️‍🔥 🫠",
    "cjk": "我爱北京天安门。东京タワーは３３３メートルです。ひらがな、カタカナ。한국어 문장입니다.𠮷野家",
    "rtl": "שלום עולם, مرحبا بالعالم! نص‌ با نیم‌فاصله \u202bRTL\u202c",
    "mixed": "naïve😀word漢字mixed123абвγδε",
    "spaces": "a\u00a0b\u2003c\u3000d\u200be\u2028f\u0085g\u180eh\u1680i\ufeffj",
    "controls": "nul\x00bell\x07esc\x1b[0m del\x7f us\x1f c1\x9f fs\x1c",
    "punct": "!!??...---«»„“”‘’…—–·¡¿$€£¥+<=>^`|~@#%&*()[]{}\\/\"';:,.",
    "apostrophes": "don't DON'T 's 'S ſ 'ſ ' ' n't  it's' 'll' rock'n'roll",
    "underscores": "snake_case __init__ ▁ ▁▁x a▁b _ ‿ ⁀",
    "url": "https://example.org/a?b=c&d=%20#frag user@host.tld C:\\dir\\file.txt",
    "bytes_like": "<0x0A> <0xE2><0x96> <unk> Ġ Ċ",
    "special": "<s>Hello</s> <unk>world <s> a</s>b  </s>  c",
    "special2": "<|begin|>Hi<|end|> <|end|>x <|pad|> <|begin| >  <|tool|>  y<|tool|>z <|tool|> ",
    "special3": "word wordy a word. [L]  [L]x  [R]  x [N] n [N]ORM [n] <mask>  <mask>q",
    "private": "\ue000\uf8ff\U000f0000\U0010ffff \ufffd \ufffe\uffff",
    "upper": "ÀÉÎ ΑΒΓΣ ΣΑΣ ДЖ İI ẞ Ⓐ",
    "repeat": "ababababab aaaaaaaaaa the the the theththe 000000000",
    "math": "∀x∈ℝ: ⌈x⌉ = −⌊−x⌋, α ∧ ¬β → ∑ᵢ xᵢ² ≤ ∞, 𝓗𝓮𝓵𝓵𝓸 ①②",
    "greek": "Ὀδυσσεύς ἄνθρωπος. Тест кириллицы — ёжик. Հայերեն ქართული አማርኛ ភាសាខ្មែរ ไทย",
}
BYTES = {  # not UTF-8
    "bad_lone": b"ab\x80cd\xffef\xc0\xaf g",
    "bad_cut": b"caf\xc3 \xe2\x82 \xf0\x9f\x98 end\xe2\x82",
    "bad_surrogate": b"x\xed\xa0\x80y\xed\xbf\xbfz \xf4\x90\x80\x80 \xf8\x88\x80\x80\x80",
    "bad_overlong": b"\xe0\x80\xaf\xf0\x80\x80\xaf\xc1\x81 \xe2\x28\xa1",
    "latin1": "Käse für größere Füße".encode("latin-1"),
}
REPEATED = {  # unit, times
    "long_word": ("abcdefghij", 10000),
    "long_a": ("a", 100000),
    "long_blank": (" ", 100000),
    "long_newline": ("\n", 20000),
    "long_digits": ("1234567890", 2000),
    "long_cjk": ("漢字", 5000),
    "long_emoji": ("👨‍👩‍👧", 2000),
    "long_blank_word": ("          x", 3000),
}


def fnv(data: bytes) -> str:
    h = 0xCBF29CE484222325
    for b in data:
        h = ((h ^ b) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return f"{h:016x}"


def ids_hash(ids):
    return fnv(b"".join(i.to_bytes(8, "little") for i in ids))


def all_texts():
    for name, text in TEXTS.items():
        yield name, text.encode(), 1
    for name, data in BYTES.items():
        yield name, data, 1
    for name, (unit, times) in REPEATED.items():
        yield name, unit.encode(), times


def corpus():
    lines = HEAD.read_text(encoding="utf-8").splitlines(keepends=True)[:600]
    return lines + [t for t in TEXTS.values() for _ in range(3)]


def shown(text: str):
    data = text.encode()
    return {"bytes": len(data), "hash": fnv(data), **({"text": text} if len(data) <= 300 else {})}


def record(name, tokenizer, model, skip=()):
    rows = []
    for text_name, data, times in all_texts():
        if text_name in skip:
            continue
        text = (data * times).decode(errors="replace")
        plain = tokenizer.encode(text, add_special_tokens=False)
        full = tokenizer.encode(text)
        row = {"name": text_name, "n": len(plain), "hash": ids_hash(plain), "n_special": len(full), "hash_special": ids_hash(full)}
        if len(plain) <= 100:
            row["ids"] = plain
        row["decoded"] = shown(tokenizer.decode(full, skip_special_tokens=False))
        row["decoded_skip"] = shown(tokenizer.decode(full, skip_special_tokens=True))
        rows.append(row)
    head = tokenizer.encode(HEAD.read_bytes().decode())
    size = max(tokenizer.get_vocab().values()) + 1
    # Ids in an order that no text gives: lone bytes, special tokens inside, blanks first.
    state, odd = 12345, []
    for length in (1, 1, 1, 1, 2, 3, 5, 8, 13, 40, 100, 300):
        ids = []
        for _ in range(length):
            state = (state * 1103515245 + 12345) % 2**31
            ids.append((state >> 8) % size)
        odd.append({"ids": ids, "decoded": shown(tokenizer.decode(ids, skip_special_tokens=False)),
                    "decoded_skip": shown(tokenizer.decode(ids, skip_special_tokens=True))})
    golden = {"model": model, "vocab_size": size, "bos_id": tokenizer.bos_token_id, "eos_id": tokenizer.eos_token_id,
              "head": {"n": len(head), "hash": ids_hash(head)}, "texts": rows, "decode": odd}
    with open(OUT / f"{name}.json", "w", encoding="utf-8") as f:
        f.write("{\n")
        for key, value in golden.items():
            if key in ("texts", "decode"):
                body = ",\n".join(json.dumps(v, ensure_ascii=True) for v in value)
                f.write(f'"{key}": [\n{body}\n]' + ("\n" if key == "decode" else ",\n"))
            else:
                f.write(f'"{key}": {json.dumps(value)},\n')
        f.write("}\n")
    print(f"{name}: {size} tokens, {len(head)} ids for the head")


def save(name, tok, config):
    folder = OUT / name
    folder.mkdir(parents=True, exist_ok=True)
    tok.save(str(folder / "tokenizer.json"), pretty=False)
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return folder


def template(bos, bos_id, eos=None, eos_id=None):
    single = f"{bos} $A" + (f" {eos}" if eos else "")
    tokens = [(bos, bos_id)] + ([(eos, eos_id)] if eos else [])
    return processors.TemplateProcessing(single=single, pair=f"{single} $B", special_tokens=tokens)


def byte_level(name, pre, normalizer=None, post=None, vocab=420, edit=None, config=None, **model):
    tok = Tokenizer(models.BPE(**model))
    tok.normalizer = normalizer
    tok.pre_tokenizer = pre
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=["<|begin|>", "<|end|>", "<|pad|>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tok.train_from_iterator(corpus(), trainer)
    tok.add_tokens([AddedToken("<|tool|>", lstrip=True, rstrip=True, normalized=False, special=True),
                    AddedToken("word", single_word=True, normalized=True),
                    AddedToken("[L]", lstrip=True, normalized=False), AddedToken("[R]", rstrip=True, normalized=True),
                    AddedToken("[N]", normalized=True)])
    if post == "begin":
        tok.post_processor = template("<|begin|>", 0)
    elif post == "sequence":
        tok.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template("<|begin|>", 0, "<|end|>", 1)])
    else:
        tok.post_processor = processors.ByteLevel()
    folder = save(name, tok, {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>", "eos_token": "<|end|>",
                              **(config or {})})
    if edit:
        path = folder / "tokenizer.json"
        data = json.loads(path.read_text(encoding="utf-8"))
        edit(data)
        path.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    record(name, AutoTokenizer.from_pretrained(folder), f"tests/golden/tokenizers/{name}")


def spm_like(name, normalizer, pre, decoder, config=None, vocab=640, edit=None, fallback=True, cls="LlamaTokenizer", unk=True, fuse=True):
    tok = Tokenizer(models.BPE(unk_token="<unk>" if unk else None, fuse_unk=fuse, byte_fallback=fallback))
    # A word for training ends at a blank; the real file has no pre-tokenizer where `pre` is None.
    tok.normalizer = normalizer
    tok.pre_tokenizer = pre or pre_tokenizers.Split("▁", "merged_with_next")
    special = ["<unk>", "<s>", "</s>"] + ([f"<0x{b:02X}>" for b in range(256)] if fallback else [])
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=special, show_progress=False, limit_alphabet=90)
    tok.train_from_iterator(corpus(), trainer)
    data = json.loads(tok.to_str())
    data["added_tokens"] = data["added_tokens"][:3]  # the bytes are plain tokens of the vocabulary
    if pre is None:
        data["pre_tokenizer"] = None
    if edit:
        edit(data)
    tok = Tokenizer.from_str(json.dumps(data))
    tok.decoder = decoder
    tok.add_tokens([AddedToken("<|tool|>", lstrip=True, rstrip=True, normalized=False, special=True),
                    AddedToken("word", single_word=True, normalized=False), AddedToken("[N]", normalized=True),
                    AddedToken("[L]", lstrip=True, normalized=False), AddedToken("[R]", rstrip=True, normalized=False)])
    if cls != "LlamaTokenizer":
        tok.post_processor = template("<s>", 1)
    folder = save(name, tok, {"tokenizer_class": cls, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **(config or {})})
    record(name, AutoTokenizer.from_pretrained(folder), f"tests/golden/tokenizers/{name}")


def string_merges(data):
    data["model"]["merges"] = [" ".join(m) if isinstance(m, list) else m for m in data["model"]["merges"]]


def sp_llama(name, source, config, model=None):
    folder = OUT / name
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(source / "tokenizer.model", folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    record(name, LlamaTokenizer.from_pretrained(folder), f"tests/golden/tokenizers/{name}")


def train_sp(folder):
    import sentencepiece
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "corpus.txt").write_text("".join(corpus()).replace("\x00", ""), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=700, model_type="bpe", byte_fallback=True,
        character_coverage=0.99, normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        allow_whitespace_only_pieces=True, num_threads=1, minloglevel=2)
    for extra in ("corpus.txt", "tokenizer.vocab"):
        (folder / extra).unlink()


def train_sp_nfkc(folder):
    import sentencepiece
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "corpus.txt").write_text("".join(corpus()).replace("\x00", ""), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=500, model_type="bpe", byte_fallback=False,
        character_coverage=0.985, normalization_rule_name="nmt_nfkc", num_threads=1, minloglevel=2)
    for extra in ("corpus.txt", "tokenizer.vocab"):
        (folder / extra).unlink()


def main():
    args = argparse.ArgumentParser()
    args.add_argument("--small-mha", type=pathlib.Path, help="folder of the model small-mha, which is not in the repository")
    args.add_argument("--tiny-gqa", type=pathlib.Path, default=ROOT / "models/tiny-gqa")
    args = args.parse_args()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    rows = [json.dumps({"name": n, "hex": d.hex(), "times": t}) for n, d, t in all_texts()]
    (OUT / "texts.json").write_text("[\n" + ",\n".join(rows) + "\n]\n")

    bl, split = pre_tokenizers.ByteLevel, pre_tokenizers.Split
    seq = pre_tokenizers.Sequence
    byte_level("llama3_like", seq([split(Regex(LLAMA3), "isolated"), bl(add_prefix_space=False, use_regex=False)]),
               post="sequence", ignore_merges=True, config={"clean_up_tokenization_spaces": True})
    byte_level("qwen2_like", seq([split(Regex(QWEN2), "isolated"), bl(add_prefix_space=False, use_regex=False)]),
               normalizer=normalizers.NFC(), edit=string_merges)
    byte_level("gpt2_like", bl(add_prefix_space=False, use_regex=True), post="begin", edit=string_merges)
    byte_level("gpt2_prefix", bl(add_prefix_space=True, use_regex=True), config={"add_prefix_space": True})
    byte_level("digits_punct", seq([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.Punctuation("contiguous"),
                                    bl(add_prefix_space=False, use_regex=True)]),
               normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), normalizers.Strip()]))
    byte_level("split_kinds", seq([pre_tokenizers.Digits(individual_digits=False), split(",", "merged_with_previous"),
                                   split(Regex(r"[.;]\s?"), "merged_with_next"), split(Regex(r"\w+"), "removed", invert=True),
                                   split(Regex(r"\b(?=[A-Z])|[aeiou]{2}+"), "contiguous"), bl(add_prefix_space=False, use_regex=False)]),
               normalizer=normalizers.Sequence([normalizers.NFD(), normalizers.Replace(Regex(r"\s+"), " ")]))
    byte_level("whitespace", seq([pre_tokenizers.Whitespace(), bl(add_prefix_space=True, use_regex=False)]), normalizer=normalizers.NFKD())

    sp_decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    sp_norm = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    spm_like("llama2_like", sp_norm, None, sp_decoder)
    spm_like("llama2_eos", sp_norm, None, sp_decoder, config={"add_bos_token": False, "add_eos_token": True}, edit=string_merges)
    for scheme in ("first", "always", "never"):
        spm_like(f"metaspace_{scheme}", None, pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=scheme != "first"),
                 decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace("▁", prepend_scheme=scheme, split=False)]),
                 cls="PreTrainedTokenizerFast")
    spm_like("unk_fused", None, pre_tokenizers.Metaspace(), decoders.Metaspace(), fallback=False, vocab=300, cls="PreTrainedTokenizerFast")
    spm_like("unk_single", None, seq([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]), decoders.Metaspace(), fallback=False, vocab=300,
             cls="PreTrainedTokenizerFast", fuse=False)

    train_sp(OUT / "sp_tiny")
    added = {str(i): {"content": c, "lstrip": l, "rstrip": r, "normalized": False, "single_word": w, "special": s}
             for i, c, l, r, w, s in [(0, "<unk>", 0, 0, 0, 1), (1, "<s>", 0, 0, 0, 1), (2, "</s>", 0, 0, 0, 1),
                                      (700, "<|tool|>", 1, 1, 0, 1), (701, "word", 0, 0, 1, 0), (702, "[L]", 1, 0, 0, 0),
                                      (703, "[R]", 0, 1, 0, 0)]}
    for row in added.values():
        row.update({k: bool(row[k]) for k in ("lstrip", "rstrip", "single_word", "special")})
    base = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "added_tokens_decoder": added}
    sp = OUT / "sp_tiny"
    (sp / "tokenizer_config.json").write_text(json.dumps(base, indent=1) + "\n")
    record("sp_tiny", LlamaTokenizer.from_pretrained(sp), "tests/golden/tokenizers/sp_tiny")
    sp_llama("sp_modern", sp, {**base, "legacy": False, "add_bos_token": True, "add_eos_token": True,
                               "additional_special_tokens": ["<|tool|>"], "pad_token": "<|pad|>"})
    nfkc = OUT / "sp_nfkc"
    train_sp_nfkc(nfkc)
    (nfkc / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False}) + "\n")
    record("sp_nfkc", LlamaTokenizer.from_pretrained(nfkc), "tests/golden/tokenizers/sp_nfkc")

    record("tiny_gqa", LlamaTokenizer.from_pretrained(args.tiny_gqa), "models/tiny-gqa")
    if args.small_mha:
        record("small_mha", AutoTokenizer.from_pretrained(args.small_mha), "models/small-mha")


if __name__ == "__main__":
    sys.exit(main())
