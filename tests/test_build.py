"""Checkpoints built offline: the base's tokenizer, sizes."""

from __future__ import annotations

from latexocr.build import build_latex_tokenizer
from latexocr.dialects import DIALECTS

CORPUS = [
    r"\frac { a } { b }",
    r"\frac { a } { b } + \alpha",
    r"\frac { a } { b } + \begin{matrix} a & b \end{matrix}",
]


def test_tokens_are_those_of_latex():
    """A token each, with the blank before it or without; what occurs once is spelled in bytes."""
    tokenizer = build_latex_tokenizer(CORPUS, DIALECTS["qwen2_vl"], least=2)
    for text in (r"\frac { a } { b }", r"\frac{a}{b}"):
        assert [token.replace("Ġ", "") for token in tokenizer.tokenize(text)] == [r"\frac", *"{a}{b}"]
    assert tokenizer.tokenize(r" \alpha") == ["Ġ", "\\", *"alpha"]
    with_matrix = build_latex_tokenizer(CORPUS, DIALECTS["qwen2_vl"], least=1)
    assert with_matrix.tokenize(r" \begin{matrix} a & b") == [r"Ġ\begin{matrix}", "Ġa", "Ġ&", "Ġb"]


def test_every_text_can_be_written():
    tokenizer = build_latex_tokenizer(CORPUS, DIALECTS["qwen2_vl"])
    for text in ("", r"\unknown{xyz} é 设", "two  blanks\nand\ta tab", r"\\[2pt] \{ \} \, |", "<|im_end|>"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_prompt_is_spelled_in_words():
    tokenizer = build_latex_tokenizer(CORPUS, DIALECTS["qwen2_vl"])
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Write the LaTeX of the formula in this image."}],
        tokenize=False, add_generation_prompt=True,
    )  # fmt: skip
    assert len(tokenizer(text)["input_ids"]) == 29
