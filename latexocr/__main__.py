"""`python -m latexocr VERB` is `latexocr VERB`."""

import sys

from latexocr.cli import main

sys.exit(main())
