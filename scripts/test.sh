#!/usr/bin/env bash
# All tests: bash scripts/test.sh [pytest arguments]. Installs what they need into .venv first.
# `bash scripts/test.sh -m "not slow"` runs the quick ones.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
prepare_environment dev
cd "$ROOT"
export OMP_WAIT_POLICY=PASSIVE # see latexocr/cli.py
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # a process for each core instead
command -v chromium >/dev/null 2>&1 || [ -n "${CHROMIUM:-}" ] ||
    echo "no chromium found: the tests of the pages will be skipped (on Debian: apt-get install chromium)"
command -v dvipng >/dev/null 2>&1 ||
    echo "no dvipng found: the tests with LaTeX will be skipped (on Debian: apt-get install texlive-latex-recommended" \
        "texlive-fonts-recommended dvipng)"
"$VENV/bin/ruff" check --quiet .
"$VENV/bin/ruff" format --check --quiet .
exec "$VENV/bin/python" -m pytest -n auto --maxprocesses 4 --dist worksteal "$@"
