"""Checkpoints of real architectures with random weights, built offline from a configuration.

Why: tests, the quickstart and speed measurements need a real model where no hub can be reached. A tiny one goes
through every line of code that the full one does; the full-size shape is right for speed and memory.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, Literal

from latexocr.config import PROMPT
from latexocr.errors import InputError

BUNDLED_CORPUS = Path(__file__).resolve().parent.parent / "data" / "sample" / "metadata.jsonl"
# What every record says beside its formula: Qwen's tokenizer knows these words, so ours must not spell them out.
TEMPLATE_WORDS = ("system\nYou are a helpful assistant.", "\nuser\n", PROMPT, "\nassistant\n")
# Special tokens and conversation format of Qwen's chat models.
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first and message.role != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
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

TINY_TEXT = dict(
    hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=32768, tie_word_embeddings=True,
    # Wider than the usual 0.02: LoRA leaves the head frozen, and over 128 dimensions a head that small could not
    # give any token a high probability.
    initializer_range=0.1,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
)  # fmt: skip
# 11 million parameters with 1,000 tokens. Patches of 6 pixels: a visual token covers one or two glyphs of print that
# is 14 pixels high. The decoder is small, so that it looks at the picture instead of learning texts by heart.
BASE_TEXT = dict(
    hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=32768, tie_word_embeddings=True,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]},
)  # fmt: skip
BASE_VISION = dict(depth=8, embed_dim=256, num_heads=4, mlp_ratio=4, hidden_size=256, patch_size=6)
# Shape of Qwen/Qwen2-VL-2B-Instruct, from its published config.json.
QWEN2_VL_2B_TEXT = dict(
    hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
    vocab_size=151936, max_position_embeddings=32768, rms_norm_eps=1e-6, tie_word_embeddings=True,
    rope_parameters={"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]},
)  # fmt: skip
# model type -> size -> (text configuration, vision configuration); vocab_size follows the tokenizer unless given
SHAPES: dict[str, dict[str, tuple[dict, dict]]] = {
    "qwen2_vl": {
        "tiny": (TINY_TEXT, dict(depth=2, embed_dim=64, num_heads=4, mlp_ratio=2, hidden_size=128)),
        "base": (BASE_TEXT, BASE_VISION),
        "2b": (QWEN2_VL_2B_TEXT, dict(depth=32, embed_dim=1280, num_heads=16, mlp_ratio=4, hidden_size=1536)),
    },
    "qwen2_5_vl": {
        "tiny": (TINY_TEXT, dict(depth=2, hidden_size=64, num_heads=4, intermediate_size=128, out_hidden_size=128,
                                 fullatt_block_indexes=[1])),
    },
    "qwen3_vl": {
        "tiny": ({**TINY_TEXT, "head_dim": 32},
                 dict(depth=2, hidden_size=64, num_heads=4, intermediate_size=128, out_hidden_size=128,
                      patch_size=16, num_position_embeddings=256, deepstack_visual_indexes=[0])),
    },
}  # fmt: skip


def build(
    output: Path,
    *,
    corpus: Path | None = None,
    model_type: str = "qwen2_vl",
    size: Literal["tiny", "base", "2b"] = "tiny",
    dtype: Literal["float32", "bfloat16"] = "float32",
    seed: int = 0,
) -> str:
    """Build a checkpoint folder with random weights: real architecture, tokenizer, processor, chat template.

    Args:
        output: folder to write; must be new or empty.
        corpus: formulas that the tokenizer is made of (data.csv, metadata.jsonl or one a line; the checkout's bundled
            sample when left out): byte-level BPE, for the base a token for each LaTeX token.
        model_type: architecture: qwen2_vl, qwen2_5_vl or qwen3_vl.
        size: tiny (under a million parameters, for the CPU), base (11 million, to be trained from nothing with
            `--finetuning full`) or 2b (the full shape of Qwen2-VL-2B).
        dtype: type of the stored weights.
        seed: of the random weights.

    Raises:
        InputError: an unknown architecture or size, an unreadable corpus, or a folder in use.
    """
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText, set_seed

    from latexocr.modeling import no_progress_bars

    if model_type not in SHAPES or size not in SHAPES[model_type]:
        known = ", ".join(f"{kind} ({', '.join(sizes)})" for kind, sizes in SHAPES.items())
        raise InputError(f"no shape for {model_type} in size {size}; known: {known}")
    if output.exists() and any(output.iterdir()):
        raise InputError(f"{output}: not empty; choose a new folder")
    texts = read_corpus(corpus or BUNDLED_CORPUS)
    tokenizer = build_latex_tokenizer(texts) if size == "base" else build_tokenizer(texts)
    text, vision = SHAPES[model_type][size]
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    config = AutoConfig.for_model(
        model_type,
        text_config={"vocab_size": len(tokenizer), **text, "bos_token_id": ids["<|endoftext|>"],
                     "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"]},
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=text["tie_word_embeddings"],
    )  # fmt: skip
    set_seed(seed)
    device = "cuda" if size == "2b" and torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, dtype))
    with no_progress_bars():
        model.save_pretrained(output, save_original_format=True)
    build_processor(model_type, tokenizer, vision.get("patch_size", 14)).save_pretrained(output)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    return f"{output}: {model_type} ({size}), {millions:,.1f} million random weights, {len(tokenizer):,} tokens"


def build_tokenizer(texts: list[str], vocab_size: int = 1024) -> Any:
    """A byte-level BPE tokenizer with Qwen's special tokens and chat template, trained on records of `texts`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((part for text in texts for part in (*TEMPLATE_WORDS, text)), trainer)
    return _chat_tokenizer(bpe)


def build_latex_tokenizer(texts: list[str], *, least: int = 3) -> Any:
    r"""A tokenizer of LaTeX tokens, with the blank before them or without: `\frac`, `\begin{matrix}`, `x`.

    Why: the answer is as short as it can be, and no token of a command is shared with another command. Whatever is
    not a token is spelled in bytes, so every text can be written.

    Args:
        texts: a LaTeX token that occurs in them becomes a token,
        least: if it occurs at least so often.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    from latexocr.metrics import normalize

    counts = Counter(token for text in texts for token in normalize(text, level=1).split())
    words = [token for token, count in counts.most_common() if count >= least]
    words += [word for words_said in TEMPLATE_WORDS for word in re.findall(r" ?[A-Za-z]+|[^A-Za-z]", words_said)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    spelled = [_in_bytes(form) for word in words for form in (word, f" {word.lstrip()}")]
    vocabulary = list(dict.fromkeys([*SPECIAL_TOKENS, *alphabet, *spelled]))
    # ignore_merges: what the expression below cuts out is one token if it is in the vocabulary, else its bytes
    bpe = Tokenizer(models.BPE({token: at for at, token in enumerate(vocabulary)}, [], ignore_merges=True))
    pieces = r" ?\\(begin|end) ?\{[a-z]+\*?\}| ?\\[A-Za-z]+| ?\\.| ?[A-Za-z]{2,}| ?\S|\s"
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pieces), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    return _chat_tokenizer(bpe)


def _in_bytes(text: str) -> str:
    """As the byte-level alphabet writes it: a blank is `Ġ`."""
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str(text)[0][0]


def _chat_tokenizer(bpe: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL_TOKENS), chat_template=CHAT_TEMPLATE, model_max_length=32768,
    )  # fmt: skip


def build_processor(model_type: str, tokenizer: Any, patch_size: int) -> Any:
    """The architecture's own processor class around `tokenizer`."""
    import transformers

    name = {
        "qwen2_vl": "Qwen2VLProcessor",
        "qwen2_5_vl": "Qwen2_5_VLProcessor",
        "qwen3_vl": "Qwen3VLProcessor",
    }
    video = {"qwen3_vl": "Qwen3VLVideoProcessor"}.get(model_type, "Qwen2VLVideoProcessor")
    return getattr(transformers, name[model_type])(
        image_processor=transformers.Qwen2VLImageProcessor(patch_size=patch_size),
        tokenizer=tokenizer,
        video_processor=getattr(transformers, video)(patch_size=patch_size),
        chat_template=CHAT_TEMPLATE,
    )


def read_corpus(path: Path) -> list[str]:
    """Texts from data.csv (column text), metadata.jsonl (key text) or a file with one formula a line."""
    if not path.is_file():
        raise InputError(f"{path}: no such file of formulas; give one with --corpus")
    with path.open(encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            texts = [row.get("text", "") for row in csv.DictReader(file)]
        elif path.suffix == ".jsonl":
            texts = [json.loads(line).get("text", "") for line in file if line.strip()]
        else:
            texts = [line.strip() for line in file]
    texts = [text for text in texts if text]
    if not texts:
        raise InputError(f"{path}: no formulas in it (needs a column or key 'text', or one formula a line)")
    return texts
