#!/usr/bin/env python3
"""bench_table.py FILE.json...: a Markdown table of what Google Benchmark wrote, one row per benchmark.

Of repeated runs it shows the median and the spread; GB/s and its share of a plain read belong to the median.
"""

import json
import re
import sys


def rows(path):
    """{benchmark: {aggregate: entry}} of one file, in its order."""
    found = {}
    for entry in json.load(open(path, encoding="utf-8"))["benchmarks"]:
        if entry.get("run_type") == "aggregate":
            name = re.sub(r"/(min_time|repeats|manual_time|real_time)(:[\d.]+)?", "", entry["run_name"])
            found.setdefault(name, {})[entry["aggregate_name"]] = entry
    return found


def cell(entry, key, form):
    return format(entry[key], form) if key in entry else ""


def main():
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    print("| benchmark | median | min | cv | GB/s | of a plain read | bits per value | nmse |")
    print("|---|---|---|---|---|---|---|---|")
    for path in sys.argv[1:]:
        for name, of in rows(path).items():
            median, unit = of["median"], of["median"]["time_unit"]
            least = f"{of['min']['real_time']:.3g}" if "min" in of else ""
            cells = [f"`{name}`", f"{median['real_time']:.3g} {unit}", least, f"{100 * of['cv']['real_time']:.1f} %", cell(median, "GB/s", ".2f"),
                     cell(median, "of_read", ".2f"), cell(median, "bits_per_value", ".1f"), cell(median, "nmse", ".1e")]
            print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
