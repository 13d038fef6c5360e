"""``python -m cli`` is `baton`, also where nothing is installed."""

import sys

import baton_llm

if __name__ == "__main__":
    sys.exit(baton_llm.main())
