"""Write the options tables of README.md and README.zh-CN.md, from the dataclass that defines the options.

    python scripts/readme_options.py

The Chinese meanings are here, under the English text that they translate: when that text changes, the translation
no longer counts and the table shows the English one until somebody translates it again.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # the checkout, not scripts/ (its names would shadow packages)

from latexocr.config import option_table
from latexocr.contract import write_text

HEADS = {"README.md": "| option | default | meaning |", "README.zh-CN.md": "| 选项 | 默认值 | 含义 |"}
BETWEEN = re.compile(r"(?<=<!-- options -->\n).*?(?=<!-- /options -->)", re.DOTALL)
CHINESE = {
    "base model: a folder or a hub id": "底座模型：本地目录或模型库 id",
    "fresh weights from the base's config.json instead of its own (needs full)": (
        "按底座的 config.json 随机初始化权重，不用它的权重（需要 full）"
    ),
    "where a hub id is downloaded from": "从哪个平台下载 id 对应的文件",
    "run Python code that comes with a checkpoint": "是否运行检查点自带的 Python 代码",
    "training records, as csv2json writes them": "训练记录，即 csv2json 的输出",
    "validation records; without them nothing is evaluated": "验证记录；不给则不做验证",
    "checkpoints, metrics.jsonl, config.yaml, adapter/ or model/": (
        "输出目录：检查点、metrics.jsonl、config.yaml、adapter/ 或 model/"
    ),
    "discard an earlier run in output_dir instead of refusing": "删掉 output_dir 里的旧训练，而不是拒绝运行",
    "the instruction beside every image (default: the base's, else 'Write the LaTeX of the formula in this image.')": (
        "每张图片旁的指令（默认：与底座训练时相同，否则 'Write the LaTeX of the formula in this image.'）"
    ),
    "fit: keep the aspect ratio; fixed: stretch to one size (default: the base's, else fit)": (
        "fit：保持宽高比；fixed：拉伸到固定尺寸（默认：与底座训练时相同，否则 fit）"
    ),
    "fit: small images are enlarged to about this many visual tokens (default: the base's, else 64)": (
        "fit：小图放大到约这么多视觉 token（默认：与底座训练时相同，否则 64）"
    ),
    "fit: large images are shrunk to at most this many visual tokens (default: the base's, else 1024)": (
        "fit：大图缩小到至多这么多视觉 token（默认：与底座训练时相同，否则 1024）"
    ),
    "fixed: height in pixels, rounded to whole cells (default: the base's, else 100)": (
        "fixed：高度（像素），取整到完整的格子（默认：与底座训练时相同，否则 100）"
    ),
    "fixed: width in pixels, rounded to whole cells (default: the base's, else 500)": (
        "fixed：宽度（像素），取整到完整的格子（默认：与底座训练时相同，否则 500）"
    ),
    "longest record in tokens: prompt, image, answer and end token": "一条记录最多多少 token，含图像和结束符",
    "a longer record is dropped and counted, or refused": "超长记录：drop 丢弃并计数，error 报错",
    "lora: adapters on frozen weights; full: every weight": "lora：权重冻结，只训练适配器；full：训练全部权重",
    "rank": "LoRA 的秩",
    "scale: the update is multiplied by lora_alpha / lora_r": "缩放：更新量乘以 lora_alpha / lora_r",
    "dropout before the adapter": "适配器之前的 dropout",
    "which parts get adapters: language, vision, merger": "给哪些部分加适配器：language、vision、merger",
    "share of answer tokens that the decoder is shown wrong in training": "训练时解码器看到的错误答案 token 的比例",
    "style in which each training picture is varied anew in every epoch": "每轮训练以何种风格重新变换每张图片",
    "passes over the training records": "训练数据遍历几遍",
    "samples a device and micro-batch": "每张卡每个微批的样本数",
    "compute the frozen vision tower's output once, keep it on disk": "冻结的视觉塔只算一次，输出存盘",
    "tokens a device and micro-batch, in place of a number of samples": "每张卡每个微批的 token 数上限，取代样本数",
    "vision patches a device and micro-batch, likewise": "每张卡每个微批的视觉 patch 数上限，同上",
    "micro-batches a step": "每步累积几个微批",
    "peak learning rate of AdamW": "AdamW 的最高学习率",
    "bfloat16 arithmetic, and weights if frozen (default: where the GPU has it)": (
        "计算和冻结的权重用 bfloat16（默认：GPU 支持时）"
    ),
    "adapter/ or model/ is the best checkpoint, not the last (default: true where each one is evaluated)": (
        "adapter/ 或 model/ 取最好的而不是最后的检查点（默认：每个检查点都验证时为 true）"
    ),
    "batches in one row without padding (default: where the GPU can, and on CPUs)": (
        "把一批样本拼成一行，不填充（默认：GPU 支持时，以及在 CPU 上）"
    ),
    "norms, gates and rotary positions in one kernel each (default: on a GPU)": (
        "归一化、门控和旋转位置各用一个内核（默认：有 GPU 时）"
    ),
    "loss without holding all logits (default: weights not sharded)": "不保存全部 logits 的 loss（默认：权重未切分）",
    "adapters in kernels of our own (default: bfloat16 on a GPU, not sharded)": (
        "适配器用自己的内核（默认：GPU 上的 bfloat16，未切分）"
    ),
    "replay steps as CUDA graphs (default: with fused_lora, or full in bf16)": (
        "以 CUDA graph 重放训练步（默认：与 fused_lora 一起，或 full 且 bf16 时）"
    ),
    "validate and keep a moving average of the weights with this decay, such as 0.999 (default: none)": (
        "验证并保存权重的滑动平均，衰减率如 0.999（默认：不用）"
    ),
    "hide NaN losses; looking for them stalls the GPU at every step": "隐藏 NaN loss；逐步检查会拖慢 GPU",
    "seed of initialisation, order and dropout": "初始化、样本顺序和 dropout 的随机种子",
    "image workers a process (default: cores, at most 8)": "每个进程的读图进程数（默认：CPU 核数，最多 8）",
    "keep the workers from one epoch to the next (default: true where there are any)": (
        "各轮之间保留读图进程（默认：有读图进程时为 true）"
    ),
    "no, steps or epoch (default: epoch when there is a val_json)": (
        "no、steps 或 epoch（默认：有 val_json 时为 epoch）"
    ),
    "no, steps or epoch (default: as eval_strategy, else epoch)": (
        "no、steps 或 epoch（默认：同 eval_strategy，否则 epoch）"
    ),
    "checkpoints kept besides the best one": "除最好的之外保留几个检查点",
    "samples a device in validation": "验证时每张卡的样本数",
    "samples a device generated at once; fewer where memory is short": "每张卡同时生成的样本数；显存不足时自动减少",
    "validation rows that are also generated and scored": "验证集中有多少行还要生成并打分",
    "longest generated answer in tokens": "生成的答案最多多少 token",
    "what picks the best checkpoint (default: eval_edit_distance, or eval_loss without generation)": (
        "按哪个指标选最好的检查点（默认 eval_edit_distance；不生成时为 eval_loss）"
    ),
    "stop after this many evaluations without improvement": "连续几次验证没有进步就停止",
    "steps between two lines of metrics.jsonl": "metrics.jsonl 每两行之间隔几步",
    "log step 1 too": "第 1 步也记录",
    "validation pictures on the dashboard, at most eval_generate_samples": (
        "看板上展示几张验证图片，不超过 eval_generate_samples"
    ),
    "online, local, offline or disabled (default: what this machine allows)": (
        "online、local、offline 或 disabled（默认：按本机条件选择）"
    ),
    "SwanLab project (default: SWANLAB_PROJECT, else latexocr)": (
        "SwanLab 项目名（默认：SWANLAB_PROJECT，否则 latexocr）"
    ),
    "checkpoint folder, or true for the last one in output_dir": "检查点目录；true 表示 output_dir 里最新的一个",
}


def table(readme: str) -> str:
    """The Markdown table of all options for one README."""
    rows = [HEADS[readme], "|---|---|---|"]
    for name, default, meaning in option_table():
        shown = "" if default == "None" else f"`{default}`"
        text = CHINESE.get(meaning, meaning) if readme == "README.zh-CN.md" else meaning
        rows.append(f"| `{name}` | {shown} | {text} |".replace("|  |", "| |"))
    return "\n".join(rows) + "\n"


def with_table(readme: str, text: str) -> str:
    """`text` with the table between its two markers as it should be now."""
    found = BETWEEN.findall(text)
    if len(found) != 1:
        raise SystemExit(f"{readme}: needs <!-- options --> and <!-- /options --> once, on lines of their own")
    return BETWEEN.sub(lambda _: table(readme), text)


if __name__ == "__main__":
    for readme in HEADS:
        path = ROOT / readme
        write_text(path, with_table(readme, path.read_text(encoding="utf-8")))
