# Sourced by quickstart.sh and test.sh: makes .venv in the checkout with the package and the extras named in $1.
# uv installs in half a minute; pip is the fallback. A second call finds everything in place and does nothing.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV="$ROOT/.venv"
# uv compiles no bytecode, and many container images forbid Python to: then each start compiles torch and transformers
# anew, which trebles its 8 seconds of CPU time.
unset PYTHONDONTWRITEBYTECODE

die() { echo "error: $*" >&2; exit 1; }

find_python() {
    for candidate in "${LATEXOCR_PYTHON:-}" python3 python3.13 python3.12 python3.11 python3.10 python; do
        [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 || continue
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    die "Python 3.10 or newer is needed and none was found; install one or set LATEXOCR_PYTHON=/path/to/python3"
}

prepare_environment() {
    local extras=$1 stamp wanted python
    stamp="$VENV/.latexocr-$extras"
    wanted=$(cat "$ROOT/setup.py" "$ROOT/pyproject.toml" | cksum)
    [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && [ -x "$VENV/bin/latexocr" ] && return
    if [ ! -x "$VENV/bin/python" ]; then
        python=$(find_python) || exit 1
        echo "making $VENV with $("$python" --version)"
        "$python" -m venv "$VENV" || die "$python -m venv failed; on Debian or Ubuntu: apt-get install python3-venv"
    fi
    # a virtual environment made by uv has no pip
    "$VENV/bin/python" -m pip --version >/dev/null 2>&1 || "$VENV/bin/python" -m ensurepip --upgrade >/dev/null
    echo "installing latexocr[$extras] and what it needs (a few minutes at most) ..."
    "$VENV/bin/python" -m pip install --quiet uv 2>/dev/null || echo "uv is not to be had, using pip"
    if ! { [ -x "$VENV/bin/uv" ] && "$VENV/bin/uv" pip install --quiet --python "$VENV/bin/python" -e "$ROOT[$extras]"; }; then
        "$VENV/bin/python" -m pip install --quiet -e "$ROOT[$extras]" ||
            die "the packages could not be installed; check the network or the package index that pip uses"
    fi
    echo "$wanted" >"$stamp"
}
