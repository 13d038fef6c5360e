"""``python -m cli`` is `baton`, also where nothing is installed."""

import sys

from cli.app import main

if __name__ == "__main__":
    sys.exit(main())
