"""Damage to pictures: repeatable, grey in and out, and each kind does what it says."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageChops

from latexocr.augment import EFFECTS, augment
from latexocr.errors import InputError
from latexocr.styles import STYLES


@pytest.fixture
def bar() -> Image.Image:
    """A black bar, 40 x 6 pixels, on white."""
    image = Image.new("L", (80, 30), 255)
    image.paste(0, (20, 12, 60, 18))
    return image


def effect(name: str, image: Image.Image, amount: float, seed: int = 0) -> np.ndarray:
    return np.asarray(EFFECTS[name](image, amount, np.random.default_rng(seed)))


@pytest.mark.parametrize("style", STYLES)
def test_the_same_state_gives_the_same_picture(bar, style):
    before = bar.copy()
    pictures = [augment(bar, style, np.random.default_rng(seed)) for seed in (5, 5, *range(6, 30))]
    assert pictures[0].mode == "L" and pictures[0].tobytes() == pictures[1].tobytes()
    assert len({picture.tobytes() for picture in pictures}) > 5
    assert bar.tobytes() == before.tobytes()


@pytest.mark.parametrize("mode", ["P", "1", "RGB", "RGBA"])
def test_every_mode_is_taken(bar, mode):
    assert augment(bar.convert(mode), "print", np.random.default_rng(0)).mode == "L"


def test_an_unknown_style_is_named():
    with pytest.raises(InputError, match="style 'prnt' is unknown; did you mean 'print'"):
        augment(Image.new("L", (9, 9)), "prnt", np.random.default_rng(0))


def test_every_effect_of_a_style_exists():
    names = {one.name for style in STYLES.values() for one in style.effects}
    assert names == set(EFFECTS)


def test_shift_loses_no_ink(bar):
    for seed in range(20):
        moved = effect("shift", bar, 3, seed)
        assert (moved == 0).sum() == 240
    edge = ImageChops.offset(bar, -20, -12)
    assert all((effect("shift", edge, 5, seed) == 0).sum() == 240 for seed in range(20))


def test_weight_grows_or_thins(bar):
    assert (effect("weight", bar, 1.0) == 0).sum() == 41 * 7
    assert (effect("weight", bar, -1.0) == 0).sum() == 39 * 5
    assert set(np.unique(effect("weight", bar, 0.5))) == {0, 127, 255}


def test_contrast_and_fade_on_one_grey_pixel():
    grey = Image.new("L", (1, 1), 128)
    assert effect("contrast", grey, 2.0)[0, 0] == 64  # 255 * (128 / 255) ** 2
    assert effect("fade", Image.new("L", (1, 1), 55), 0.5)[0, 0] == 155  # half of 200 darker than white


def test_board_is_light_on_dark(bar):
    board = effect("board", bar, 50)
    assert board[15, 40] >= 200 and board[2, 2] < 90


def test_paper_is_grey_and_rotation_keeps_all_ink(bar):
    assert 150 < effect("paper", bar, 70)[0].mean() < 255
    turned = effect("rotate", bar, 2.0)
    assert turned.shape[0] > 30 and abs((255 - turned.astype(int)).sum() / (240 * 255) - 1) < 0.02


def test_speckle_changes_its_share_of_the_pixels(bar):
    assert 0 < (effect("speckle", bar, 0.01) != np.asarray(bar)).sum() <= 24
