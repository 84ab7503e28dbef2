"""Videos: the frames that are shown, and that our way of showing them is the model's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from latexocr.collate import FlattenedCollator, FormulaCollator, rope_positions
from latexocr.errors import InputError
from latexocr.formats import Media
from latexocr.images import ImagePolicy
from latexocr.modeling import family_in, load_base, load_processor, positions_per_second
from latexocr.preprocess import Preprocessor
from latexocr.records import read_records
from latexocr.video import read_frames, video_header

av = pytest.importorskip("av")


def make_video(path: Path, *, frames: int = 16, fps: int = 8) -> Path:
    """Each frame is greyer than the one before; 64 x 32 pixels, two seconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        for number in range(frames):
            frame = torch.full((32, 64, 3), 255 - 10 * number, dtype=torch.uint8).numpy()
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("sampling", "frames"),
    [
        ((), (0, 5, 10, 15)),
        ((("nframes", 2),), (0, 15)),
        ((("fps", 4),), (0, 2, 4, 6, 9, 11, 13, 15)),
        ((("video_start", 1.0), ("fps", 1), ("min_frames", 2)), (8, 15)),
    ],
)
def test_frames_are_chosen_as_qwen_vl_utils_does(tmp_path, sampling, frames):
    media = Media("video", make_video(tmp_path / "v.mp4"), sampling)
    header = video_header(media, "record 0")
    assert (header.size, header.fps, header.frames) == ((64, 32), 8.0, frames)
    greys = [frame.getpixel((5, 5))[0] for frame in read_frames(media, header, "record 0")]
    assert greys == pytest.approx([255 - 10 * number for number in frames], abs=6)


def test_videos_that_cannot_be_used(tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    make_video(tmp_path / "v.mp4")
    cases = {
        "gone.mp4": ((), "record 0 gone.mp4: no such video file"),
        "text.mp4": ((), r"record 0 text\.mp4: the video cannot be decoded"),
        "v.mp4": ((("nframes", 99),), r"record 0 v\.mp4: nframes should in interval"),
    }
    for name, (sampling, message) in cases.items():
        with pytest.raises(InputError, match=message):
            video_header(Media("video", tmp_path / name, sampling), "record 0")


def test_a_family_without_videos_refuses_them(tiny_models, tmp_path):
    folder = tiny_models["ernie4_5_vl_moe"]
    make_video(tmp_path / "v.mp4")
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": "<video>What?", "answer": "x", "video": "v.mp4"}))
    preprocessor = Preprocessor(load_processor(folder), family_in(folder), ImagePolicy(), "Read.")
    with pytest.raises(InputError, match=r"record 0 \(v\.mp4\): ERNIE.* is not trained on videos here"):
        preprocessor.count_tokens(read_records(tmp_path / "t.jsonl")[0])


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_the_models_own_way(model_type, tiny_models, tmp_path):
    """Ids but for the token's name, positions, logits of a picture and a video: those of the model's video path."""
    folder = tiny_models[model_type]
    make_video(tmp_path / "v.mp4")
    row = {"text": "<video_no_1>What <image_no_1>?", "answer": "x + 1", "videos": ["v.mp4"], "images": ["v.png"]}
    (tmp_path / "t.jsonl").write_text(json.dumps(row))
    processor, model = load_processor(folder), load_base(folder, dtype=torch.float32).eval()
    cell = processor.image_processor.patch_size * 2
    preprocessor = Preprocessor(
        processor, family_in(folder), ImagePolicy(cell, min_visual_tokens=2), "Read.",
        positions_per_second=positions_per_second(folder),
    )  # fmt: skip
    media = Media("video", tmp_path / "v.mp4")
    header = video_header(media, "")
    frames = [preprocessor.policy.apply(frame) for frame in read_frames(media, header, "")]
    frames[0].save(tmp_path / "v.png")
    (record,) = read_records(tmp_path / "t.jsonl")
    sample = preprocessor(record)
    assert preprocessor.count_tokens(record).total == len(sample["input_ids"])

    messages = [
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What "}, {"type": "image"},
                                     {"type": "text", "text": "?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "x + 1"}]},
    ]  # fmt: skip
    text = processor.apply_chat_template(messages, tokenize=False).removesuffix("\n")
    metadata = {"total_num_frames": 16, "fps": 8.0, "frames_indices": list(header.frames), "video_backend": "pyav"}
    video = torch.stack(
        [torch.frombuffer(bytearray(f.tobytes()), dtype=torch.uint8).view(f.height, f.width, 3) for f in frames]
    )
    theirs = processor(
        text=[text], images=[frames[0]], videos=[video.permute(0, 3, 1, 2)], video_metadata=[metadata],
        do_resize=False, do_sample_frames=False, return_tensors="pt",
    )  # fmt: skip
    ids = theirs["input_ids"][0]
    assert (
        sample["input_ids"].tolist() == ids.where(ids != processor.video_token_id, processor.image_token_id).tolist()
    )
    given = {"second_per_grid_ts": theirs["second_per_grid_ts"]} if "second_per_grid_ts" in theirs else {}
    positions, _ = model.model.get_rope_index(
        ids[None], mm_token_type_ids=theirs["mm_token_type_ids"], image_grid_thw=theirs["image_grid_thw"],
        video_grid_thw=theirs["video_grid_thw"], **given,
    )  # fmt: skip
    ours = rope_positions(
        sample["mm_token_type_ids"], sample["image_grid_thw"], 2, intervals=sample.get("frame_intervals")
    )
    assert torch.equal(ours, positions[:, 0])

    options = {"tokenizer": processor.tokenizer, "family": preprocessor.family, "blank": preprocessor.blank}
    for collate in (FormulaCollator(**options), FlattenedCollator(**options)):
        from latexocr.attention import VARLEN, set_attention

        batch = collate([sample])
        for name in ("labels", "num_samples", "num_tokens"):
            batch.pop(name, None)
        with torch.no_grad():
            set_attention(model, "sdpa")
            wanted = model(**{key: torch.as_tensor(value) for key, value in theirs.items() if key != "video_metadata"},
                           logits_to_keep=batch["logits_to_keep"]).logits  # fmt: skip
            set_attention(model, VARLEN if "text_cu_seqlens" in batch else "sdpa")
            batch["image_grid_thw"] = torch.as_tensor(batch["image_grid_thw"])
            found = model(**batch, use_cache=False).logits
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_videos_train(tiny_models, tmp_path, config):
    from latexocr.evaluate import evaluate
    from latexocr.train import train

    make_video(tmp_path / "v.mp4")
    rows = [{"text": "<video_no_1>What?", "answer": "x", "videos": ["v.mp4"]}, {"text": "1 + 1?", "answer": "2"}]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = train(
        config(model_name_or_path=str(tiny_models["qwen2_5_vl"]), train_json=str(path), val_json=str(path),
               max_steps=1, lora_components=["language", "vision"], min_visual_tokens=2)
    )  # fmt: skip
    assert result.metrics["eval_num_rows"] == 2
    found = evaluate(str(result.adapter_dir), path, tmp_path / "out", pictures=False, max_new_tokens=4)
    assert [row["reference"] for row in found.rows] == ["x", "2"]
