"""`python -m recsys_kernels`: the same as the console script `recsys-kernels`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
