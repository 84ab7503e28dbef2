"""The image policy: sizes that can be checked by hand, and pictures from every kind of source."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from latexocr.errors import InputError
from latexocr.images import ImagePolicy, Patcher, image_size, load_image, unpatchify
from latexocr.pictures import png_size


@pytest.mark.parametrize(
    ("policy", "size", "layout"),
    [
        # natural size, padded to 8 x 2 cells of 28 pixels
        (dict(min_visual_tokens=1), (200, 50), (200, 50, 224, 56)),
        (dict(min_visual_tokens=1), (28, 28), (28, 28, 28, 28)),
        # 64 tokens of 28 x 28 pixels are 50,176 pixels: scale sqrt(50176 / 10000) = 2.24
        (dict(min_visual_tokens=64), (200, 50), (448, 112, 448, 112)),
        # 4 x 4 cells shrunk to at most 4
        (dict(min_visual_tokens=1, max_visual_tokens=4), (112, 112), (56, 56, 56, 56)),
        # the tutorial's 100 x 500: 4 x 18 cells
        (dict(mode="fixed", height=100, width=500), (33, 77), (504, 112, 504, 112)),
        (dict(cell=32, min_visual_tokens=1), (200, 50), (200, 50, 224, 64)),
    ],
)
def test_layout(policy, size, layout):
    assert ImagePolicy(**policy).layout(*size) == layout


@pytest.mark.parametrize("size", [(4, 4), (1, 200), (640, 3), (8000, 40), (4000, 4000), (37, 911), (500, 100)])
def test_limits_hold_on_both_sides_and_the_aspect_ratio_is_kept(size):
    policy = ImagePolicy(min_visual_tokens=64, max_visual_tokens=256)
    width, height, canvas_width, canvas_height = policy.layout(*size)
    assert canvas_width % 28 == canvas_height % 28 == 0
    assert 0 <= canvas_width - width < 28 and 0 <= canvas_height - height < 28
    assert 60 <= policy.visual_tokens(*size) <= 256
    # sides are whole pixels, so the ratio may be off by the rounding of the shorter one
    assert (
        abs(width / height / (size[0] / size[1]) - 1) <= 0.51 / min(width, height) + 0.51 / max(width, height) + 1e-9
    )


def test_padding_is_white_at_the_right_and_bottom():
    seen = ImagePolicy(min_visual_tokens=1).apply(Image.new("L", (30, 20), 0))
    pixels = np.asarray(seen)
    assert pixels.shape == (28, 56, 3)
    assert (pixels[:20, :30] == 0).all() and (pixels[20:] == 255).all() and (pixels[:, 30:] == 255).all()


@pytest.mark.parametrize(
    "wrong", [dict(mode="crop"), dict(min_visual_tokens=0), dict(max_visual_tokens=3), dict(width=0)]
)
def test_impossible_policies(wrong):
    with pytest.raises(InputError):
        ImagePolicy(**wrong)


def test_every_kind_of_source_gives_the_same_picture(tmp_path):
    image = Image.effect_noise((20, 10), 50)
    image.save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), data, image, np.asarray(image)):
        assert load_image(source).tobytes() == image.tobytes()


def test_transparent_is_white_and_exif_rotation_is_applied(tmp_path):
    assert load_image(Image.new("RGBA", (8, 8), (0, 0, 0, 0))).convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn 90 degrees clockwise to view
    Image.new("L", (30, 10)).save(tmp_path / "turned.png", exif=exif)
    assert load_image(tmp_path / "turned.png").size == image_size(tmp_path / "turned.png") == (10, 30)


def corrupt(tmp_path):
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "PNG")
    path = tmp_path / "corrupt.png"
    path.write_bytes(buffer.getvalue()[:-900])
    return path


def test_bad_images_are_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.png: no such image file"):
        load_image(tmp_path / "none.png")
    with pytest.raises(InputError, match=r"row 3: undecodable image"):
        load_image(corrupt(tmp_path), "row 3")
    (tmp_path / "empty.png").touch()
    with pytest.raises(InputError, match=r"empty\.png: .*empty"):
        image_size(tmp_path / "empty.png")
    with pytest.raises(InputError, match="1x1"):
        load_image(Image.new("L", (1, 1)))
    with pytest.raises(InputError, match="no picture"):
        load_image(np.zeros((3, 4, 5, 6)))


def test_a_huge_picture_is_refused_from_its_header(tmp_path):
    path = tmp_path / "huge.png"
    Image.new("1", (20_000, 20_000)).save(path)
    with pytest.raises(InputError, match=r"huge\.png: absurd size: (20000x20000|400 megapixels)"):
        image_size(path)


@pytest.mark.parametrize(
    "name", ["Qwen2VLImageProcessor", "Ernie4_5_VLMoeImageProcessor", "PaddleOCRVLImageProcessor"]
)
def test_patches_turn_back_into_the_picture(name):
    import transformers

    processor = getattr(transformers, name)()
    noise = np.random.default_rng(0).integers(0, 256, (56, 84, 3), dtype=np.uint8)
    patches = processor(images=[Image.fromarray(noise)], do_resize=False, return_tensors="pt")
    seen = unpatchify(patches["pixel_values"], patches["image_grid_thw"][0], processor)
    assert (np.asarray(seen) == noise).all()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Qwen2VLImageProcessor", {}),
        ("Qwen2VLImageProcessor", {"patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}),
        ("Ernie4_5_VLMoeImageProcessor", {}),
        ("PaddleOCRVLImageProcessor", {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}),
    ],
)
def test_patches_equal_the_image_processors_bit_for_bit(name, options):
    import transformers

    processor = getattr(transformers, name)(**options)
    patch_size = processor.patch_size
    patcher, random = Patcher.equal_to(processor), np.random.default_rng(1)
    for rows, columns in ((1, 1), (1, 7), (7, 1), (2, 3), (4, 18), (9, 5)):
        shape = (rows * 2 * patch_size, columns * 2 * patch_size, 3)
        coloured = Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8))
        for picture, planes in ((coloured, 3), (coloured.convert("L"), 1)):
            theirs = processor(images=[picture.convert("RGB")], do_resize=False, return_tensors="pt")
            pixels, grid_thw = patcher.cut(picture)
            assert pixels.dtype == torch.uint8 and pixels.shape == (rows * columns * 4, planes, patch_size**2)
            assert torch.equal(patcher.normalise(pixels), theirs["pixel_values"])
            assert torch.equal(patcher.normalise(pixels, torch.bfloat16), theirs["pixel_values"].bfloat16())
            assert torch.equal(grid_thw, theirs["image_grid_thw"])


def test_an_image_processor_that_works_otherwise_is_not_imitated():
    from transformers import CLIPImageProcessor, Qwen2VLImageProcessor

    assert Patcher.equal_to(Qwen2VLImageProcessor()) is not None
    assert Patcher.equal_to(Qwen2VLImageProcessor(do_rescale=False)) is None
    assert Patcher.equal_to(Qwen2VLImageProcessor(do_normalize=False)) is None
    assert Patcher.equal_to(CLIPImageProcessor()) is None


def test_the_size_of_a_plain_png_is_read_without_pil_and_others_are_left_to_it(tmp_path):
    for name, mode in (
        ("1", "1"),
        ("grey", "L"),
        ("palette", "P"),
        ("rgb", "RGB"),
        ("rgba", "RGBA"),
        ("deep", "I;16"),
    ):
        path = tmp_path / f"{name}.png"
        Image.new(mode, (30, 10)).save(path)
        assert png_size(path) == image_size(path) == (30, 10)
    plain = (tmp_path / "grey.png").read_bytes()
    exif, xmp = Image.Exif(), PngImagePlugin.PngInfo()
    exif[0x0112] = 6
    xmp.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')
    Image.new("L", (30, 10)).save(tmp_path / "turned.png", exif=exif)
    Image.new("L", (30, 10)).save(tmp_path / "xmp.png", pnginfo=xmp)
    Image.new("L", (30, 10)).save(tmp_path / "no.png", format="JPEG")
    (tmp_path / "cut.png").write_bytes(plain[:-12])
    (tmp_path / "flipped.png").write_bytes(plain[:19] + b"\x1f" + plain[20:])
    Image.new("L", (3, 3)).save(tmp_path / "small.png")
    for name in ("turned", "xmp", "no", "cut", "flipped", "small"):
        assert png_size(tmp_path / f"{name}.png") is None, name
    assert image_size(tmp_path / "turned.png") == image_size(tmp_path / "xmp.png") == (10, 30)
    with pytest.raises(InputError, match=r"flipped\.png: undecodable image"):
        image_size(tmp_path / "flipped.png")
