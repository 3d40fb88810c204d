"""`python -m aerogel` is the command line."""

import sys

from aerogel.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
