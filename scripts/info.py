"""`latexocr info` as a script, for those who launch files."""

import sys
from pathlib import Path

sys.path[0] = str(
    Path(__file__).resolve().parent.parent
)  # the checkout, not scripts/ (its names would shadow packages)

from latexocr.cli import main

if __name__ == "__main__":
    sys.exit(main(["info", *sys.argv[1:]]))
