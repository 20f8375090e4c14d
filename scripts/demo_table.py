"""Prints the demo's closing table from the JSON that the program wrote: demo_table.py FOLDER SPEC...

Perplexity, bits and bytes are those of `eval ppl`; speed and the bytes after the prompt are those of `generate`.
Exits 1 where a result is missing or not a finite number.
"""

import json
import math
import os
import sys


def load(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file)["results"]


def main(folder, specs):
    rows = [("cache", "perplexity", "+-", "bits/element", "cache bytes", "decode tokens/s")]
    evaluated = {result["kv_requested"]: result for result in load(os.path.join(folder, "results.json"))}
    for spec in specs:
        if spec not in evaluated:
            sys.exit(f"demo: results.json has no result for {spec}, only {', '.join(evaluated)}")
        measured = evaluated[spec]
        (generated,) = load(os.path.join(folder, f"generate-{spec}.json"))
        values = [measured[key] for key in ("ppl", "ppl_stderr", "bits_per_element", "cache_bytes")] + [generated["tok_s"]]
        if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in values):
            sys.exit(f"demo: {spec}: not all finite: {values}")
        ppl, stderr, bits, cache_bytes, tok_s = values
        rows.append((spec, f"{ppl:.2f}", f"{stderr:.2f}", f"{bits:.2f}", f"{cache_bytes:,}", f"{tok_s:.1f}"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
