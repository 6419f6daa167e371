"""Speed of a training step, everything of it. `make bench`"""

import sys

from tests.benchmarks.train import main

if __name__ == "__main__":
    for what in ("small", "345m", "layouts", "loop"):
        main([what, *sys.argv[1:]])
