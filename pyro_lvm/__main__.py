"""``python -m pyro_lvm``: the command line, see `pyro_lvm.cli`."""

import sys

from pyro_lvm.cli import main

if __name__ == "__main__":
    sys.exit(main())
