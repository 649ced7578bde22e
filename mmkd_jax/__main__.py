"""`python -m mmkd_jax`: the command line."""

import sys

from mmkd_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
