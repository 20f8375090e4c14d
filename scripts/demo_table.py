"""Prints the demo's closing table from the JSON that the program wrote: demo_table.py FOLDER SPEC...

Perplexity, bits and bytes are those of `eval ppl`, speed is that of `generate` where there was one.
Exits 1 where a result is missing or not a finite number.
"""

import glob
import json
import math
import os
import sys


def load(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file)["results"]


def main(folder, specs):
    rows = [("cache", "perplexity", "+-", "KL to 16 bits", "bits/element", "cache bytes", "decode tokens/s")]
    evaluated = {}
    for path in sorted(glob.glob(os.path.join(folder, "results*.json"))):
        evaluated |= {result["kv_requested"]: result for result in load(path)}
    for spec in specs:
        if spec not in evaluated:
            sys.exit(f"demo: results*.json have no result for {spec}, only {', '.join(evaluated)}")
        measured = evaluated[spec]
        generate = os.path.join(folder, f"generate-{spec}.json")
        speeds = [result["tok_s"] for result in load(generate)] if os.path.exists(generate) else []
        values = [measured[key] for key in ("ppl", "ppl_stderr", "mean_kl", "bits_per_element", "cache_bytes")] + speeds
        if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in values):
            sys.exit(f"demo: {spec}: not all finite: {values}")
        ppl, stderr, kl, bits, cache_bytes = values[:5]
        speed = f"{speeds[0]:.1f}" if speeds else ""
        rows.append((spec, f"{ppl:.2f}", f"{stderr:.2f}", f"{kl:.4f}", f"{bits:.2f}", f"{cache_bytes:,}", speed))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
