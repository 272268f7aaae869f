"""How much does `import fxsparse` add to `import torch`? The promise is: under 0.3 s.

Run: python benchmarks/import_time.py [--runs 9]
Every number is the time of one statement in a fresh interpreter, after one run to warm the disk; medians and extremes.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

LIMIT = 0.3
CASES = {
    "import torch": ("pass", "import torch"),
    "import fxsparse, after torch": ("import torch", "import fxsparse"),
    "fxsparse.transform, after that": ("import torch, fxsparse", "fxsparse.transform"),
    "fxsparse.attach, after that": ("import torch, fxsparse; fxsparse.transform", "fxsparse.attach"),
    "fxsparse.export_onnx, after that": ("import torch, fxsparse; fxsparse.transform", "fxsparse.export_onnx"),
}


def seconds(before: str, statement: str) -> float:
    """Time of `statement` in a new process that has run `before`."""
    code = f"import time\n{before}\nstart = time.perf_counter()\n{statement}\nprint(time.perf_counter() - start)"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=9)
    runs = parser.parse_args().runs
    print(f"{'statement':<34} {'median s':>9} {'min':>7} {'max':>7}")
    medians = {}
    for name, (before, statement) in CASES.items():
        seconds(before, statement)
        times = [seconds(before, statement) for _ in range(runs)]
        medians[name] = statistics.median(times)
        print(f"{name:<34} {medians[name]:>9.3f} {min(times):>7.3f} {max(times):>7.3f}")
    added = medians["import fxsparse, after torch"]
    verdict = "kept" if added < LIMIT else "BROKEN"
    print(f"limit {LIMIT} s beyond torch: {verdict} ({added:.3f} s, {runs} runs)")
    return 0 if added < LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
