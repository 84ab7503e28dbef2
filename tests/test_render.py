"""What formulas print, and that a hostile one costs only itself."""

from __future__ import annotations

import io
import os
import re
import time
from pathlib import Path

import pytest
from conftest import requires_tex
from PIL import Image

from latexocr import dvi
from latexocr.errors import InputError
from latexocr.metrics.glyphs import same_picture
from latexocr.render import Rendering, draw, engine_available, render, render_pngs

FINE = [r"\frac{a}{b}", r"\sqrt{x^2}", r"\alpha+\beta", r"\sum_{i=1}^{n}i", r"\left(\frac12\right)", "x_i", r"f'",
        r"\begin{aligned}y&=\Delta\end{aligned}"]  # fmt: skip


def codes(rendering: Rendering) -> str:
    return "".join(chr(glyph.code) for glyph in rendering.glyphs)


@requires_tex
def test_boxes_of_a_known_formula():
    """x^2: italic x of 10 pt on the baseline, upright 2 of 7 pt, raised by sup1 of cmsy10, which is 4.12892 pt."""
    (rendering,) = render(["x^2"])
    base, raised = rendering.glyphs
    assert (base.font, base.size, base.code, base.x, base.y) == ("cmmi10", 10.0, ord("x"), 0.0, 0.0)
    assert (raised.font, raised.size, raised.code) == ("cmr7", 7.0, ord("2"))
    assert raised.y == pytest.approx(4.12892, abs=1e-4) and raised.x == pytest.approx(base.width, abs=0.5)
    assert rendering.rules == () and rendering.error is None and rendering.engine == "latex"


@requires_tex
def test_a_fraction_bar_is_a_rule():
    (rendering,) = render([r"\frac{a}{b}"])
    (rule,) = rendering.rules
    above, below = rendering.glyphs
    assert rule.height == pytest.approx(0.4, abs=1e-4) and above.y > rule.y > below.y
    assert rule.x <= above.x and above.x + above.width <= rule.x + rule.width + 1e-4


@requires_tex
@pytest.mark.parametrize(
    ("written", "plain"),
    [
        ("```latex\nx+y\n```", "x+y"),
        (r"\[ x+y \]", "x+y"),
        ("$$x+y$$", "x+y"),
        ("x % a comment $ {\n + y", "x+y"),
        (r"\begin{equation}x+y\label{eq}\nonumber\end{equation}", "x+y"),
        (r"\begin{align*}a&=b\\c&=d\end{align*}", r"\begin{aligned}a&=b\\c&=d\end{aligned}"),
        ("x ' ' ^ { 2 }", "x''^2"),
        (r"a \hspace { 1 c m } b", r"a\hspace{1cm}b"),
        ("x \\ ", "x"),
        (r"a \over b", r"\frac{a}{b}"),
        (r"x \tag{7}", r"x \qquad \text{(7)}"),
        (r"a \lt b", "a<b"),
        (r"\begin { m a t r i x } a \end { m a t r i x }", r"\begin{matrix}a\end{matrix}"),
    ],
)
def test_what_only_a_document_needs_is_accepted(written, plain):
    one, other = render([written, plain])
    assert one.error is None
    assert same_picture(one, other)


@requires_tex
def test_order_repetition_and_errors():
    rendered = render(["x", r"\frac{1}", "y", r"\undefined z", "x", ""])
    assert [codes(one) for one in rendered] == ["x", "", "y", "", "x", ""]
    assert [one.error for one in rendered[:3]] == [None, "Argument of \\frac  has an extra }", None]
    assert rendered[3].error == r"Undefined control sequence \undefined"
    assert rendered[5].error == "empty"


@requires_tex
def test_a_character_that_the_font_lacks_is_an_error():
    script, chinese = render([r"\mathscr{h}", "中"])
    assert "Missing character" in script.error and "Unicode character" in chinese.error


HOSTILE = {
    "reads a file": r"\input{/etc/passwd}",
    "reads a file, primitive": r"\input /etc/passwd ",
    "reads a file, stream": r"\openin5=/etc/passwd \read5 to\x \x",
    "reads through ^^": r"^^5cinput{/etc/passwd}",
    "reads through csname": r"\csname input\endcsname{/etc/passwd}",
    "reads itself": r"\input{\jobname}",
    "shell": r"\write18{touch PROOF}x",
    "shell, at once": r"\immediate\write18{touch PROOF}x",
    "writes a file": r"\newwrite\w\immediate\openout\w=PROOF \immediate\write\w{x}\immediate\closeout\w x",
    "endless macro": r"\def\x{\x}\x",
    "endless growth": r"\def\x{a\x}\x",
    "endless signs of progress": r"\gdef\x{\csname lx@begin\endcsname{0}\egroup\count9=0 \y\x}"
    r"\gdef\y{\advance\count9 1 \ifnum\count9<1000000 \expandafter\y\fi}\x",
    "endless loop of messages": r"\loop\message{xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx}\iftrue\repeat",
    "10 MB": "x" * 10_000_000,
    "10,000 braces": "{" * 10_000 + "x" + "}" * 10_000,
    "10,000 delimiters": r"\left(" * 10_000,
    "3,000 roots": r"\sqrt" * 3_000 + "x",
    "ends the document": r"\end{document}",
    "ends the document, balanced": r"\begin{document}\end{document}",
    "stops": r"\stop",
    "waits for the terminal": r"\errorstopmode\undefined",
    "hides its errors": r"\batchmode\undefined",
    "unbalanced": "}}}} a",
    "unbalanced the other way": "{{{{ a",
    "environment left open": r"\begin{matrix} a & b",
    "group in disguise": r"\egroup\egroup x",
    "group in disguise, opened": r"\bgroup\bgroup x",
    "branch never closed": r"\iffalse",
    "alignment": r"a & b \\ c \cr d",
    "delimiters without end": r"\left( \left[ a",
    "100 errors": r"\Bigl\overrightarrow{x}",
    "math within math": "a $ b",
    "control characters": "a\x00b\x07",
    "half a surrogate": "a\ud800b",
}
POISON = {
    "redefines \\par": r"\gdef\par{z}x",
    "redefines \\shipout": r"\global\let\shipout\undefined x",
    "redefines \\frac": r"\gdef\frac#1#2{z}x",
    "redefines through csname": r"\expandafter\gdef\csname alpha\endcsname{z}x",
    "all assignments global": r"\globaldefs=1 \let\alpha=z x",
    "everything is z": r"\global\everymath{z}x",
    "catcodes": r"\global\catcode`\\=12 x",
    "a page of its own": r"\shipout\hbox{z}x",
    "LaTeX's own definitions": r"\newcommand{\y}{z}\renewcommand{\beta}{z}\setcounter{page}{9}\y",
    "fonts": r"\global\fontdimen22\textfont2=40pt x",
    "redefines through \\begin": r"\begin{gdef}\Delta{z}\end{gdef}",
    "redefines through \\begin, spelled": r"\begin { g\empty def}\Delta{z}\end { g\empty def}",
    "redefines through \\UseName": r"\UseName{gdef}\Delta{z}",
    "redefines through \\ExpandArgs": r"\ExpandArgs{c}\UseName{gdef}{Delta}{z}",
    "redefines through a package": r"\bmdefine\Delta{\Gamma}",
    "hooks": r"\AddToHook{env/aligned/begin}{z}x",
}


@pytest.fixture(scope="module")
def clean() -> list[Rendering]:
    return render(FINE)


@requires_tex
@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_formula_costs_only_itself(text, clean, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    started = time.monotonic()
    text = text.replace("PROOF", str(tmp_path / "proof"))
    rendered = render([*FINE[:4], text, *FINE[4:]], seconds=2.0)
    assert time.monotonic() - started < 20
    assert rendered[:4] + rendered[5:] == clean
    assert "root" not in codes(rendered[4])  # nothing of /etc/passwd
    assert list(tmp_path.iterdir()) == []
    assert rendered[4].error is not None or len(rendered[4].glyphs) < 100


@requires_tex
@pytest.mark.parametrize("text", POISON.values(), ids=POISON)
def test_a_formula_cannot_change_the_others(text, clean):
    rendered = render([*FINE[:4], text, *FINE[4:], *(f"x_{{{number}}}" for number in range(60))])
    assert rendered[:4] + rendered[5:9] == clean
    assert all(one.error is None for one in rendered[9:])


@requires_tex
def test_reasons():
    texts = [r"\batchmode x", r"\def\x{\x}\x", r"\def\x{a\x}\x", r"\write18{ls}\undefined", "{", "x^", "x" * 30_000]
    ended, endless, growing, unknown, open_brace, bare, long = (one.error for one in render(texts, seconds=1.0))
    assert ended == "ends or silences TeX" and endless.startswith("stopped: no end within 1 s")
    assert growing.startswith("TeX capacity exceeded") and unknown == r"Undefined control sequence \undefined"
    assert (open_brace, bare) == ("unbalanced groups", "script without argument")
    assert long == "longer than 20000 characters"


@requires_tex
def test_many_broken_formulas_cost_little(clean):
    """Errors that TeX survives do not end its run, and those that it does not survive end it once each."""
    broken = [rf"\frac{{{number}}}" for number in range(200)] + [r"\left( x", r"\sqrt", r"\mathbf"] * 20
    started = time.monotonic()
    rendered = render([*FINE, *broken])
    assert time.monotonic() - started < 10
    assert rendered[: len(FINE)] == clean and all(one.error for one in rendered[len(FINE) :])


@pytest.mark.slow
@requires_tex
def test_all_hostile_formulas_at_once(clean):
    rendered = render([*FINE, *HOSTILE.values(), *POISON.values()], seconds=2.0)
    assert rendered[: len(FINE)] == clean


@pytest.mark.slow
@requires_tex
def test_an_unknown_poison_is_noticed_and_cut_out(clean, monkeypatch):
    """With the list of dangerous words emptied, everything shares one process, and the probes must tell."""
    monkeypatch.setattr("latexocr.render._PROGRAM", re.compile("(?!)"))
    for text in (r"\gdef\alpha{z}x", r"\gdef\frac#1#2{z}x", r"\globaldefs=1 \let\beta=z x", r"\def\x{\x}\x", r"\stop"):
        rendered = render([*FINE[:4], text, *FINE[4:]], seconds=2.0)
        assert rendered[:4] + rendered[5:] == clean, text


@requires_tex
def test_files_outside_the_folder_are_refused(tmp_path):
    """TeX's own guard, and not an accident of the attack: an open file would print "open"."""
    (tmp_path / "secret.tex").write_text("secret")
    test = r"\openin5=%s \ifeof5 \mathrm{none}\else\mathrm{open}\fi"
    own, outside, parent = render([test % name for name in ("out.aux", tmp_path / "secret.tex", "../x.tex")])
    assert (codes(own), codes(outside), codes(parent)) == ("open", "none", "none")
    (writes,) = render([rf"\newwrite\w\immediate\openout\w={tmp_path}/written x"])
    assert writes.error.startswith("I can't write on file")
    assert [path.name for path in tmp_path.iterdir()] == ["secret.tex"]


@requires_tex
def test_a_file_beside_the_formulas_is_not_read(tmp_path, monkeypatch):
    (tmp_path / "secret.tex").write_text("secret")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TEXINPUTS", f"{tmp_path}:")
    for name in ("secret", tmp_path / "secret", f"../{tmp_path.name}/secret"):
        assert "secret" not in codes(render([rf"\mathrm{{\input{{{name}}}}}"])[0])


@requires_tex
def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    render(["x", r"\def\x{\x}\x"], seconds=1.0)
    assert list(tmp_path.iterdir()) == []
    running = [p for p in Path("/proc").glob("[0-9]*/environ") if os.access(p, os.R_OK)]
    assert not any(str(tmp_path).encode() in _read(path) for path in running if path.parent.name != str(os.getpid()))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


@requires_tex
def test_boxes_survive_a_dvi_file(tmp_path, clean):
    pages = [(one.glyphs, one.rules) for one in clean]
    dvi.write(tmp_path / "boxes.dvi", pages)
    assert list(dvi.read(tmp_path / "boxes.dvi")) == pages


@requires_tex
def test_a_truncated_dvi_file_just_ends(tmp_path, clean):
    pages = [(one.glyphs, one.rules) for one in clean]
    dvi.write(tmp_path / "boxes.dvi", pages)
    whole = (tmp_path / "boxes.dvi").read_bytes()
    for size in range(0, len(whole), 97):
        (tmp_path / "cut.dvi").write_bytes(whole[:size])
        read = list(dvi.read(tmp_path / "cut.dvi"))
        assert read == pages[: len(read)]


def picture(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("L")


@requires_tex
def test_pictures():
    """A rule of 1 x 0.5 inch at 100 dpi is 100 x 50 black pixels; what does not render has no picture."""
    black, none, blank, one, again = render_pngs([r"\rule{1in}{0.5in}", r"\frac{1}", r"\quad", "x", "x"], dpi=100)
    assert picture(black).size in {(100, 50), (101, 51), (101, 50), (100, 51)}
    assert picture(black).getextrema()[0] == 0
    assert none is None and blank is None and one == again
    assert picture(one).getextrema()[0] < 60


@requires_tex
def test_one_picture_is_the_picture_of_the_batch():
    rendering = render([r"\frac{a}{b}"])[0]
    assert rendering.png(dpi=200) == render_pngs(["x", r"\frac{a}{b}"], dpi=200)[1]
    with pytest.raises(InputError, match="Undefined control sequence"):
        render([r"\undefined"])[0].png()


@requires_tex
def test_a_huge_picture_is_not_drawn():
    """Neither one that is too long nor one of so many pixels that Pillow would refuse to open it."""
    wide, large, small = draw(render([r"\rule{16000pt}{1pt}", r"\rule{7000pt}{7000pt}", "x"]), dpi=150)
    assert (wide, large) == (None, None) and small is not None


def test_mathtext_stands_in():
    rendered = render([r"\frac{a}{b}", "x^2", r"\begin{matrix}a\end{matrix}", "x^2_", "x" * 5000], engine="mathtext")
    assert [one.error is None for one in rendered] == [True, True, False, False, False]
    assert len(rendered[0].rules) == 1 and codes(rendered[1]) == "x2"
    base, raised = rendered[1].glyphs
    assert base.y == 0 and raised.y > 3 and raised.size == pytest.approx(0.7 * base.size, rel=0.01)
    assert {one.engine for one in rendered} == {"mathtext"}
    assert picture(rendered[0].png()).getextrema()[0] < 60
    assert render_pngs(["x^2_", "x"], engine="mathtext")[0] is None


@pytest.mark.parametrize(("spaced", "tight"), [("x ^ { 2 }", "x^{2}"), (r"\sum _ i x ' ^ 2", r"\sum_i x'^2")])
def test_mathtext_sets_spaced_scripts(spaced, tight):
    """Tokens apart, as data sets write them: matplotlib would set an empty script and then the 2 on the line."""
    first, second = render([spaced, tight], engine="mathtext")
    assert first.glyphs == second.glyphs and all(glyph.code != ord(" ") for glyph in first.glyphs)


def test_blanks_that_mathtext_keeps():
    r"""`\_` and `\ ` are characters of their own."""
    for text, num_glyphs in ((r"a \_ b", 3), (r"a\ ^{2}", 2)):
        (found,) = render([text], engine="mathtext")
        assert found.error is None and len(found.glyphs) == num_glyphs


def test_hostile_texts_for_mathtext():
    for text in HOSTILE.values():
        started = time.monotonic()
        render([text], engine="mathtext")
        assert time.monotonic() - started < 10


def test_engines(monkeypatch):
    with pytest.raises(InputError, match="unknown; use latex or mathtext"):
        render(["x"], engine="word")
    monkeypatch.setenv("PATH", "/nowhere")
    assert engine_available() == "mathtext"
    assert render(["x"])[0].engine == "mathtext"
    with pytest.raises(InputError, match="install TeX Live"):
        render(["x"], engine="latex")


def test_nothing_to_render():
    assert render([]) == [] and render_pngs([]) == []
