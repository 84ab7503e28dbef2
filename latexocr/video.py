"""Videos: which frames are shown, known from the file's header, and those frames as pictures.

Why not `qwen_vl_utils.process_vision_info` as a whole: it opens any URL, and its reader from torchvision is gone since
torchvision 0.24. Its rules are used (`smart_nframes`: two frames a second, at least four, an even number), the file
is decoded by PyAV, and a frame becomes a canvas as every picture does (`latexocr.images.ImagePolicy`).
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from latexocr.errors import InputError
from latexocr.formats import Media


class Header(NamedTuple):
    """What is known before a frame is decoded.

    Args:
        size: width and height in pixels.
        fps: frames a second of the file.
        frames: numbers of those that are shown, in order, an even number of them.
        sampled_fps: of the shown ones.
    """

    size: tuple[int, int]
    fps: float
    frames: tuple[int, ...]
    sampled_fps: float


def video_header(media: Media, where: str) -> Header:
    """Size of a video, and the frames that are shown of it.

    Raises:
        InputError: no such file, no video, or one from which its `sampling` cannot choose frames.
    """
    from qwen_vl_utils.vision_process import calculate_video_frame_range, smart_nframes

    with _opened(media, where) as (container, stream):
        size = stream.codec_context.width, stream.codec_context.height
        fps = float(stream.average_rate or stream.guessed_rate or 0)
        total = stream.frames or sum(1 for packet in container.demux(stream) if packet.size)
    if not total or not fps or not all(size):
        raise InputError(f"{where} {media.name}: holds no frames; remove the record or replace the video")
    sampling = dict(media.sampling)
    try:
        first, last, count = calculate_video_frame_range(sampling, total, fps)
        number = smart_nframes(sampling, total_frames=count, video_fps=fps)
    except (ValueError, AssertionError) as error:
        raise InputError(f"{where} {media.name}: {' '.join(str(error).split())}; mend its sampling") from error
    frames = np.linspace(first, last, number).round().astype(int).tolist()
    return Header(size, fps, tuple(frames), number / count * fps)


def read_frames(media: Media, header: Header, where: str) -> list[Image.Image]:
    """The shown frames, in colours.

    Raises:
        InputError: the video cannot be decoded as far as the last of them.
    """
    wanted, found = set(header.frames), {}
    with _opened(media, where) as (container, stream):
        for number, frame in enumerate(container.decode(stream)):
            if number in wanted:
                found[number] = frame.to_image()
            if len(found) == len(wanted):
                break
    if len(found) < len(wanted):
        raise InputError(
            f"{where} {media.name}: frame {min(wanted - found.keys())} cannot be decoded; remove the record or "
            "replace the video"
        )
    return [found[number] for number in header.frames]


@contextmanager
def _opened(media: Media, where: str) -> Iterator[tuple[Any, Any]]:
    try:
        import av
    except ImportError as error:
        raise InputError(f"{where} {media.name}: videos need PyAV: pip install av") from error
    content = media.load(where)
    file = io.BytesIO(content) if isinstance(content, bytes) else str(content)
    try:
        with av.open(file) as container:
            if not container.streams.video:
                raise InputError(f"{where} {media.name}: holds no video; remove the record or replace the file")
            yield container, container.streams.video[0]
    except FileNotFoundError as error:
        raise InputError(
            f"{where} {media.name}: no such video file {content}; relative paths begin at the data file's folder"
        ) from error
    except av.FFmpegError as error:
        raise InputError(
            f"{where} {media.name}: the video cannot be decoded ({error.strerror}); remove the record or replace it"
        ) from error
