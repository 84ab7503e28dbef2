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

from latexocr.dialects import DIALECTS, Dialect
from latexocr.errors import InputError
from latexocr.shapes import SHAPES

ON_CPU = ("tiny", "base")  # quickly made anywhere, and then the same everywhere
SHARD_SIZE = "5GB"
BUNDLED_CORPUS = Path(__file__).resolve().parent.parent / "data" / "sample" / "metadata.jsonl"


def build(
    output: Path,
    *,
    corpus: Path | None = None,
    model_type: str = "qwen2_vl",
    size: Literal["tiny", "base", "0.9b", "2b", "3b", "7b", "8b", "28b-a3b", "32b"] = "tiny",
    dtype: Literal["float32", "bfloat16"] = "float32",
    seed: int = 0,
) -> str:
    """Build a checkpoint folder with random weights: real architecture, tokenizer, processor, chat template.

    Args:
        output: folder to write; must be new or empty.
        corpus: formulas that the tokenizer is made of (data.csv, metadata.jsonl or one a line; the checkout's bundled
            sample when left out): byte-level BPE, for the base a token for each LaTeX token.
        model_type: architecture: qwen2_vl, qwen2_5_vl, qwen3_vl, ernie4_5_vl_moe or paddleocr_vl.
        size: tiny (about a million parameters, for the CPU), base (11 million, to be trained from nothing with
            `--finetuning full`) or that of a published checkpoint: 2b and 7b of Qwen2-VL, 3b, 7b and 32b of
            Qwen2.5-VL, 8b of Qwen3-VL, 28b-a3b of ERNIE-4.5-VL, 0.9b of PaddleOCR-VL; made on the GPU if there is one.
        dtype: type of the stored weights.
        seed: of the random weights.

    Raises:
        InputError: an unknown architecture or size, an unreadable corpus, or a folder in use.
    """
    import torch
    from transformers import AutoModelForImageTextToText, set_seed

    from latexocr.modeling import no_progress_bars

    if model_type not in SHAPES or size not in SHAPES[model_type]:
        known = ", ".join(f"{kind} ({', '.join(sizes)})" for kind, sizes in SHAPES.items())
        raise InputError(f"no shape for {model_type} in size {size}; known: {known}")
    if output.exists() and any(output.iterdir()):
        raise InputError(f"{output}: not empty; choose a new folder")
    texts = read_corpus(corpus or BUNDLED_CORPUS)
    dialect = DIALECTS[model_type]
    tokenizer = build_latex_tokenizer(texts, dialect) if size == "base" else build_tokenizer(texts, dialect)
    config = build_config(model_type, size, tokenizer)
    set_seed(seed)
    device = "cuda" if size not in ON_CPU and torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, dtype))
    with no_progress_bars():
        model.save_pretrained(output, save_original_format=True, max_shard_size=SHARD_SIZE)
    build_processor(dialect, tokenizer, config.vision_config.patch_size).save_pretrained(output)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    return f"{output}: {model_type} ({size}), {millions:,.1f} million random weights, {len(tokenizer):,} tokens"


def build_config(model_type: str, size: str, tokenizer: Any) -> Any:
    """The architecture's configuration in that size, with the ids of the tokenizer's special tokens."""
    from transformers import AutoConfig

    dialect, (text, vision) = DIALECTS[model_type], SHAPES[model_type][size]
    ids = dict(zip(dialect.tokens, tokenizer.convert_tokens_to_ids(list(dialect.tokens)), strict=True))
    return AutoConfig.for_model(
        model_type,
        text_config={
            "vocab_size": len(tokenizer),
            **text,
            "bos_token_id": ids[dialect.begin],
            "eos_token_id": ids[dialect.end],
            "pad_token_id": ids[dialect.pad],
        },
        vision_config=vision,
        tie_word_embeddings=text["tie_word_embeddings"],
        **{f"{role}_id": ids[token] for role, token in dialect.roles.items()},
    )


def build_tokenizer(texts: list[str], dialect: Dialect, vocab_size: int = 1024) -> Any:
    """A byte-level BPE tokenizer with a family's special tokens and chat template, trained on records of `texts`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(dialect.tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((part for text in texts for part in (*dialect.words, text)), trainer)
    return _chat_tokenizer(bpe, dialect)


def build_latex_tokenizer(texts: list[str], dialect: Dialect, *, least: int = 3) -> Any:
    r"""A tokenizer of LaTeX tokens, with the blank before them or without: `\frac`, `\begin{matrix}`, `x`.

    Why: the answer is as short as it can be, and no token of a command is shared with another command. Whatever is
    not a token is spelled in bytes, so every text can be written.

    Args:
        texts: a LaTeX token that occurs in them becomes a token,
        dialect: special tokens, chat template and the words around an answer.
        least: if it occurs at least so often.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    from latexocr.metrics import normalize

    counts = Counter(token for text in texts for token in normalize(text, level=1).split())
    words = [token for token, count in counts.most_common() if count >= least]
    words += [word for words_said in dialect.words for word in re.findall(r" ?[A-Za-z]+|[^A-Za-z]", words_said)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    spelled = [_in_bytes(form) for word in words for form in (word, f" {word.lstrip()}")]
    vocabulary = list(dict.fromkeys([*dialect.tokens, *alphabet, *spelled]))
    # ignore_merges: what the expression below cuts out is one token if it is in the vocabulary, else its bytes
    bpe = Tokenizer(models.BPE({token: at for at, token in enumerate(vocabulary)}, [], ignore_merges=True))
    pieces = r" ?\\(begin|end) ?\{[a-z]+\*?\}| ?\\[A-Za-z]+| ?\\.| ?[A-Za-z]{2,}| ?\S|\s"
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pieces), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    return _chat_tokenizer(bpe, dialect)


def _in_bytes(text: str) -> str:
    """As the byte-level alphabet writes it: a blank is `Ġ`."""
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str(text)[0][0]


def _chat_tokenizer(bpe: Any, dialect: Dialect) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=dialect.end, pad_token=dialect.pad, chat_template=dialect.template,
        extra_special_tokens=list(dialect.tokens), model_max_length=32768,
        **(dialect.roles if dialect.on_tokenizer else {}),
    )  # fmt: skip


def build_processor(dialect: Dialect, tokenizer: Any, patch_size: int) -> Any:
    """The architecture's own processor class around `tokenizer`."""
    import transformers

    processor, image, *video = (getattr(transformers, name) for name in dialect.processor)
    parts = {"image_processor": image(patch_size=patch_size), "tokenizer": tokenizer}
    if video:
        parts["video_processor"] = video[0](patch_size=patch_size, **dialect.video)
    return processor(**parts, chat_template=dialect.template)


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
