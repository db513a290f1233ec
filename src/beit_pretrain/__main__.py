"""`python -m beit_pretrain`: the command line (cli.py)."""

import sys

from beit_pretrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
