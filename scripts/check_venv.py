"""Checks that a venv holds what requirements.txt pins, whole: every file that the wheels installed is there with its size.

Run by the venv's own python: check_venv.py requirements.txt. Prints the first thing wrong and exits 1, else exits 0.
"""

import csv
import os
import re
import sys
import sysconfig


def fault(requirements_path):
    site = sysconfig.get_path("purelib")
    with open(requirements_path, encoding="utf-8") as file:
        pins = re.findall(r"^([A-Za-z0-9._-]+)==([^\s\\;]+)", file.read(), re.MULTILINE)
    if not pins:
        return f"{requirements_path} pins nothing"
    for name, version in pins:
        record = os.path.join(site, f"{re.sub(r'[-.]+', '_', name)}-{version}.dist-info", "RECORD")
        if not os.path.exists(record):
            return f"{name} {version} is not installed"
        with open(record, newline="", encoding="utf-8") as file:
            for path, _, size in csv.reader(file):
                if not size:
                    continue
                try:
                    got = os.stat(os.path.join(site, path)).st_size
                except OSError:
                    return f"{name}: {path} is missing"
                if got != int(size):
                    return f"{name}: {path} has {got} bytes, expected {size}"
    return None


if __name__ == "__main__":
    problem = fault(sys.argv[1])
    if problem:
        print(problem)
        sys.exit(1)
