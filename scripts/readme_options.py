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
    "training records: .json or .jsonl, .parquet, a folder that datasets saved, or a hub id[:subset[:split]]": (
        "训练记录：.json、.jsonl、.parquet、datasets 保存的目录，或模型库 id[:子集[:划分]]"
    ),
    "validation records, likewise; without them nothing is evaluated": ("验证记录，格式同上；没有则不做验证"),
    "open URLs that records name, once: ~/.cache/latexocr/urls keeps what they hold": (
        "允许打开记录中的 URL；每个只下载一次，内容保存在 ~/.cache/latexocr/urls"
    ),
    "open files that records name outside of their data file's folder": ("允许打开数据文件所在目录之外的文件"),
    "read training records (.jsonl, .parquet) as they come, never all of them (needs max_steps)": (
        "边读边训练（.jsonl、.parquet），不读入全部记录（需要 max_steps）"
    ),
    "answers of a conversation that are trained: all, or the last": (
        "训练对话中的哪些回答：全部（all）或最后一个（last）"
    ),
    "answers without reasoning begin with an empty <think> block": ("没有思考过程的回答以空的 <think> 块开头"),
    "what answers are, latex or json: chooses the metrics of validation": (
        "回答的格式，决定验证时使用的指标：latex 或 json"
    ),
    "what gets adapters: language, vision, merger, attention, mlp, or one of one: vision.mlp": (
        "给哪些部分加适配器：language、vision、merger、attention、mlp，或其中之一的一部分，如 vision.mlp"
    ),
    "in place of lora_components: the layers whose whole path matches this regular expression": (
        "代替 lora_components：整个路径匹配此正则表达式的层"
    ),
    "pissa: adapters begin as the main part of the weights; loftq: as what 4 bits lost of them": (
        "pissa：适配器从权重的主成分开始；loftq：从 4 位量化丢失的部分开始"
    ),
    "scale the update by lora_alpha / sqrt(lora_r), for large ranks": (
        "更新乘以 lora_alpha / sqrt(lora_r)，适合大的秩"
    ),
    "train the length of each row of the weights apart from its direction; slower": (
        "把权重每行的长度与方向分开训练；较慢"
    ),
    "LoRA+: the second matrix of an adapter learns this many times faster, such as 16": (
        "LoRA+：适配器第二个矩阵的学习率倍数，例如 16"
    ),
    "full: what is not trained: vision, merger, language, embeddings, or expressions found in parameter names": (
        "full：不训练的部分：vision、merger、language、embeddings，或在参数名中查找的正则表达式"
    ),
    "words, or files of one a line, that become tokens with embeddings of their own": (
        "成为独立词元的词（或每行一个词的文件），其嵌入会被训练"
    ),
    "QLoRA: the frozen base in 4 bits (NF4, double quantisation; bitsandbytes)": (
        "QLoRA：冻结的底座以 4 位存放（NF4，双重量化；需 bitsandbytes）"
    ),
    "the frozen base in 8 bits (LLM.int8; bitsandbytes)": ("冻结的底座以 8 位存放（LLM.int8；需 bitsandbytes）"),
    "what 4 or 8 bits hold: language, vision, merger, head; 4 bits also experts": (
        "以 4 位或 8 位存放的部分：language、vision、merger、head；4 位时还可有 experts"
    ),
    "the frozen table of embeddings stays in the host's memory, where the GPU reads its rows": (
        "冻结的词嵌入表留在主机内存，由 GPU 直接读取所需的行"
    ),
    "mixture of experts: weight of the loss for unequal use of experts (default: as config.json says)": (
        "混合专家：专家使用不均衡损失的权重（默认：按 config.json）"
    ),
    "others for parts, such as vision=1e-5 merger=1e-5 language=1e-4 embeddings=2e-5 new_tokens=1e-3": (
        "各部分单独的学习率，例如 vision=1e-5 embeddings=2e-5 new_tokens=1e-3"
    ),
    "base model: a folder or a hub id": "底座模型：本地目录或模型库 id",
    "fresh weights from the base's config.json instead of its own (needs full)": (
        "按底座的 config.json 随机初始化权重，不用它的权重（需要 full）"
    ),
    "where a hub id is downloaded from: modelscope or huggingface": (
        "从哪个平台下载 id 对应的文件：modelscope 或 huggingface"
    ),
    "run Python code that comes with a checkpoint": "是否运行检查点自带的 Python 代码",
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
    "drop: a longer record is left out and counted; error: it is refused": "drop：超长记录丢弃并计数；error：报错",
    "lora: adapters on frozen weights; full: every weight": "lora：权重冻结，只训练适配器；full：训练全部权重",
    "rank": "LoRA 的秩",
    "scale: the update is multiplied by lora_alpha / lora_r": "缩放：更新量乘以 lora_alpha / lora_r",
    "dropout before the adapter": "适配器之前的 dropout",
    "share of answer tokens that the decoder is shown wrong in training": "训练时解码器看到的错误答案 token 的比例",
    "style (im2latex, print, scan, pencil, chalk) in which each training picture is varied anew in every epoch": (
        "每轮训练以何种风格（im2latex、print、scan、pencil、chalk）重新变换每张图片"
    ),
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
    "no, steps, epoch or best (default: as eval_strategy, else epoch)": (
        "no、steps、epoch 或 best（默认：同 eval_strategy，否则 epoch）"
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
