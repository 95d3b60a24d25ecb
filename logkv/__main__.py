# PYTHON_ARGCOMPLETE_OK
"""`python -m logkv` is the command `logkv`."""

import sys

from logkv.cli import main

if __name__ == "__main__":      # the demo's processes import this module anew
    sys.exit(main())
