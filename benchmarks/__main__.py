"""``python -m benchmarks``: the suite of prefix_attn.bench, which an installed user calls as ``prefix-attn bench``."""

import sys

from prefix_attn.bench.main import main

if __name__ == "__main__":
    sys.exit(main(restart=("-m", "benchmarks")))
