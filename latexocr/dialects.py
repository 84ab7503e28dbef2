"""How published checkpoints write a conversation: special tokens, chat template, processor classes.

The templates are written for `latexocr build`, after what the published ones give for an instruction with a picture
and its answer: Qwen's as repeated in many public repositories, ERNIE's as in transformers'
`convert_ernie4_5_vl_moe_to_hf.py`, PaddleOCR-VL's as of its second edition (the first had `Assistant: `).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from latexocr.config import PROMPT

QWEN3_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part.type == 'video' -%}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif part.type == 'text' -%}
{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
QWEN2_TEMPLATE = (
    """\
{%- if messages[0].role != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
"""
    + QWEN3_TEMPLATE
)
ERNIE_TEMPLATE = """\
{{- '<|begin_of_sentence|>' -}}
{%- set images = namespace(count=0) -%}
{%- for message in messages -%}
{{- {'user': 'User: ', 'assistant': '\\nAssistant: ', 'system': ''}[message.role] -}}
{%- if message.reasoning_content -%}
{{- '<think>\\n' + message.reasoning_content.strip('\\n') + '\\n</think>\\n' -}}
{%- endif -%}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}
{%- set images.count = images.count + 1 -%}
{{- 'Picture ' ~ images.count ~ ':<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>' -}}
{%- elif part.type == 'text' -%}
{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- {'user': '', 'assistant': '<|end_of_sentence|>', 'system': '\\n'}[message.role] -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '\\nAssistant: ' + ('<think>' if enable_thinking else '<think>\\n\\n</think>\\n\\n') -}}
{%- endif -%}
"""
PADDLEOCR_TEMPLATE = """\
{{- '<|begin_of_sentence|>' -}}
{%- for message in messages -%}
{{- {'user': 'User: ', 'assistant': 'Assistant:\\n', 'system': ''}[message.role] -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content if part.type == 'image' -%}
{{- '<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>' -}}
{%- endfor -%}
{%- for part in message.content if part.type == 'text' -%}
{{- part.text -}}
{%- endfor -%}
{%- endif -%}
{{- '</s>' if message.role == 'assistant' else '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:\\n' -}}{%- endif -%}
"""


@dataclass(frozen=True)
class Dialect:
    """How a family's published checkpoints write a conversation, and what classes their processors are of.

    Args:
        tokens: special tokens, first those that the tokenizer is to have.
        roles: what the configuration calls some of them.
        begin: token at the beginning of a text, in the configuration.
        end: token that ends generation.
        pad: token that fills rows up.
        template: conversation format (Jinja).
        words: what every record says beside its formula: the published tokenizer knows these words, so ours must not
            spell them out.
        processor: names of the classes of processor, image processor and, if any, video processor.
        on_tokenizer: whether the processor asks the tokenizer for the roles.
        video: settings of the video processor.
    """

    tokens: tuple[str, ...]
    roles: dict[str, str]
    begin: str
    end: str
    pad: str
    template: str
    words: tuple[str, ...]
    processor: tuple[str, ...]
    on_tokenizer: bool = False
    video: dict[str, Any] = field(default_factory=dict)


def _qwen(*processor: str, template: str = QWEN2_TEMPLATE) -> Dialect:
    return Dialect(
        tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
                "<|image_pad|>", "<|video_pad|>"),
        roles={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>",
               "vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"},
        begin="<|endoftext|>", end="<|im_end|>", pad="<|endoftext|>",
        template=template,
        words=("system\nYou are a helpful assistant.", "\nuser\n", PROMPT, "\nassistant\n"),
        processor=processor,
    )  # fmt: skip


BAIDU_TOKENS = (
    "<unk>", "<s>", "</s>", "<|begin_of_sentence|>", "<|end_of_sentence|>", "<|IMAGE_PLACEHOLDER|>", "<|IMAGE_START|>",
    "<|IMAGE_END|>", "<|VIDEO_PLACEHOLDER|>", "<|VIDEO_START|>", "<|VIDEO_END|>",
)  # fmt: skip
# model type -> dialect
DIALECTS: dict[str, Dialect] = {
    "qwen2_vl": _qwen("Qwen2VLProcessor", "Qwen2VLImageProcessor", "Qwen2VLVideoProcessor"),
    "qwen2_5_vl": _qwen("Qwen2_5_VLProcessor", "Qwen2VLImageProcessor", "Qwen2VLVideoProcessor"),
    "qwen3_vl": _qwen("Qwen3VLProcessor", "Qwen2VLImageProcessor", "Qwen3VLVideoProcessor", template=QWEN3_TEMPLATE),
    "ernie4_5_vl_moe": Dialect(
        tokens=(*BAIDU_TOKENS, "<think>", "</think>"),
        roles={"image_token": "<|IMAGE_PLACEHOLDER|>", "image_start_token": "<|IMAGE_START|>",
               "image_end_token": "<|IMAGE_END|>", "video_token": "<|VIDEO_PLACEHOLDER|>",
               "video_start_token": "<|VIDEO_START|>", "video_end_token": "<|VIDEO_END|>"},
        begin="<s>", end="</s>", pad="<unk>",
        template=ERNIE_TEMPLATE,
        words=("User: ", "Picture 1:", PROMPT, "\nAssistant: "),
        processor=("Ernie4_5_VLMoeProcessor", "Ernie4_5_VLMoeImageProcessor", "Ernie4_5_VLMoeVideoProcessor"),
        on_tokenizer=True,
        video={"draw_on_frames": False},  # its font is not ours to hand on
    ),
    "paddleocr_vl": Dialect(
        tokens=BAIDU_TOKENS,
        roles={"image_token": "<|IMAGE_PLACEHOLDER|>", "video_token": "<|VIDEO_PLACEHOLDER|>",
               "vision_start_token": "<|IMAGE_START|>", "vision_end_token": "<|IMAGE_END|>"},
        begin="<s>", end="</s>", pad="<unk>",
        template=PADDLEOCR_TEMPLATE,
        words=("User: ", PROMPT, "\nAssistant:\n"),
        processor=("PaddleOCRVLProcessor", "PaddleOCRVLImageProcessor"),
        on_tokenizer=True,
    ),
}  # fmt: skip
