"""`python -m preprocessing VERB`: an alias of `dalle-ds data VERB`."""

import sys

from dalle_ds.cli import main

if __name__ == "__main__":
    main(["data", *sys.argv[1:]])
