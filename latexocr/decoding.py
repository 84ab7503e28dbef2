"""Greedy decoding of many prompts at once, in fixed memory, replayed as CUDA graphs.

Why: `model.generate` launches two thousand kernels a token from Python and waits for the GPU after each token, so that
an H200 idles most of the time. Here prompts go through the model once, without padding (`latexocr.attention`); after
that a token is one function over fixed tensors, which a GPU replays as a graph, and the host looks only every
`CHECK_EVERY` tokens at which rows have ended. Attention reads grouped key-value heads as they are, unrepeated, and a
LoRA layer is three products instead of seven kernels; nothing is merged.

The token ids are those of `model.generate` (up to rounding).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, linear, scaled_dot_product_attention
from transformers import AttentionInterface, GenerationConfig

from latexocr.attention import VARLEN_CAPABILITY, bucketed, varlen_attention
from latexocr.collate import rope_positions
from latexocr.families import Family, family_of
from latexocr.layers import fuse_layers
from latexocr.lora import kernels_available
from latexocr.modeling import activation_dtype, inner_model
from latexocr.preprocess import joined
from latexocr.tower import Tower, boundaries

DECODING = "flash_varlen_decoding"  # "flash" in the name: see latexocr.attention
# Settings that do not change what greedy decoding means.
PLAIN = {"max_new_tokens", "eos_token_id", "pad_token_id", "bos_token_id", "transformers_version"}
CHECK_EVERY = 16  # tokens between two looks at which rows have ended
LENGTH_STEP = 256  # columns of the cache that attention reads: 256, 512, 1024, ...
ROW_FACTOR = 4  # rows on a GPU: all, a quarter, a sixteenth, ...: a graph each, so not too many
FEW_ROWS = 16  # a step with fewer is no faster
PREFILL_PATCHES = 2**16  # patches of prompts in one forward pass; bounds its memory
MEMORY_SHARE = 0.5  # of the free GPU memory may hold keys and values
# cuDNN's attention plans anew for every shape, which costs more than it saves here.
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
Normalise = Callable[[torch.Tensor], torch.Tensor]
logger = logging.getLogger(__name__)


class Answer(NamedTuple):
    """What was decoded: token ids up to and with the end token, and the sum of their losses, -ln p, in the model."""

    ids: list[int]
    loss: float


@contextmanager
def decoder_for(model: Any, config: GenerationConfig) -> Iterator[Decoder | None]:
    """A `Decoder` whose memory is released at the end; None where only `model.generate` will do, said once.

    Args:
        model: the model or the adapter around it, in evaluation mode.
        config: generation settings.
    """
    reason = unsupported(model, config)
    if reason is not None:
        _say_once(f"{reason}: answers come from transformers' own generate, which is slower")
        yield None
        return
    decoder = Decoder(model, config)
    try:
        yield decoder
    finally:
        decoder.close()


def unsupported(model: Any, config: GenerationConfig) -> str | None:
    """Why `Decoder` cannot be used with this model and these settings; None if it can."""
    inner = inner_model(model)
    plain = GenerationConfig(do_sample=False, repetition_penalty=1.0).to_dict()
    others = {name for name, value in config.to_diff_dict().items() if name not in PLAIN and value != plain[name]}
    if others:
        return f"{', '.join(sorted(others))} set"
    if "sliding_attention" in (getattr(inner.config.text_config, "layer_types", None) or ()):
        return "sliding-window attention"
    devices = {parameter.device for parameter in inner.parameters()}
    if len(devices) > 1 or inner.device.type not in ("cpu", "cuda"):
        return f"weights on {', '.join(sorted(map(str, devices)))}"
    in_16_bits = inner.device.type == "cuda" and activation_dtype(inner) != torch.float32
    if in_16_bits and torch.cuda.get_device_capability(inner.device) < VARLEN_CAPABILITY:
        return torch.cuda.get_device_name(inner.device)
    return None


@functools.cache
def _say_once(message: str) -> None:
    logger.info(message)


class Decoder:
    """Greedy answers for batches of prompts; memory and graphs serve all batches until `close`.

    The answers' columns are the same for all rows: prompts end at one column (they begin at different ones), and each
    step fills the next. Rows that have ended emit the pad token until they are dropped.

    Args:
        model: the model or the adapter around it, in evaluation mode; see `unsupported`.
        config: `max_new_tokens`, end and pad tokens.
    """

    def __init__(self, model: Any, config: GenerationConfig) -> None:
        self._inner = inner_model(model)
        self._text, self._head = self._inner.model.language_model, self._inner.lm_head
        self._device, self._dtype = self._inner.device, activation_dtype(self._inner)
        if kernels_available():
            fuse_layers(self._inner)
        ends = config.eos_token_id
        self._ends = torch.tensor([ends] if isinstance(ends, int) else list(ends), device=self._device)
        self._pad, self._max_new_tokens = config.pad_token_id, config.max_new_tokens
        self._family = family_of(self._inner.config.model_type)
        self._tower = Tower.of(self._family, self._inner.config)
        self._loras = [(layer, _short(layer)) for layer in self._inner.modules() if _is_plain_lora(layer)]
        self._cache: KeyValues | None = None
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph | None] = {}  # None: ran once as it is
        waits = self._family.routed and not (kernels_available() and self._dtype == torch.bfloat16)
        self._captures = self._device.type == "cuda" and not waits

    @torch.no_grad()
    def __call__(self, batches: Sequence[dict[str, torch.Tensor]], normalise: Normalise | None = None) -> list[Answer]:
        """One answer a row: up to and with the end token, or `max_new_tokens` long.

        Args:
            batches: prompts, each batch collated (rows, length); decoded together as far as
                memory allows.
            normalise: makes the model's input from `pixel_values` that are bytes, on the device; bytes are a
                twelfth or less of what travels otherwise.
        """
        self._normalise = normalise or (lambda pixel_values: pixel_values)
        prompts = [prompt for batch in batches for prompt in _prompts(batch, self._tower.merge_size, self._family)]
        on_device = torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()
        answers: list[Answer] = []
        with on_device, self._set_up(), sdpa_kernel(BACKENDS):
            while len(answers) < len(prompts):
                answers += self._decode(self._take(prompts[len(answers) :]))
        return answers

    def close(self) -> None:
        """Release graphs and memory."""
        self._cache, self._graphs, self._loras = None, {}, []
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # a graph's memory is not reused otherwise

    @contextmanager
    def _set_up(self) -> Iterator[None]:
        """Our attention and the short LoRA layers, until the end of the block."""
        parts = [part for part in self._inner.modules() if hasattr(part, "config")]
        configs = list({id(part.config): part.config for part in parts}.values())
        before = [config._attn_implementation for config in configs]
        for config in configs:
            config._attn_implementation = DECODING
        for layer, forward in self._loras:
            layer.forward = forward
        try:
            yield
        finally:
            for layer, _ in self._loras:
                del layer.forward
            for config, name in zip(configs, before, strict=True):
                config._attn_implementation = name

    # memory

    def _take(self, prompts: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
        """The prompts that are decoded together now, with memory for them set up."""
        longest = max(len(prompt["input_ids"]) for prompt in prompts)
        length = -(-(longest + self._max_new_tokens) // LENGTH_STEP) * LENGTH_STEP
        if self._cache is None or length > self._cache.length:
            self._cache, self._graphs = None, {}
            self._allocate(min(len(prompts), self._rows_that_fit(length)), length)
        return prompts[: self._cache.max_rows]

    def _rows_that_fit(self, length: int) -> int:
        if self._device.type != "cuda":
            return 2**31
        torch.cuda.empty_cache()  # what is reserved after it belongs to others, to the graphs of training say
        free, _ = torch.cuda.mem_get_info(self._device)
        return max(1, int(free * MEMORY_SHARE) // KeyValues.row_bytes(self._inner, length))

    def _allocate(self, rows: int, length: int) -> None:
        """All that a step reads and writes. Rows beyond the prompts' are fillers whose answers go into row `rows`."""
        options = {"dtype": torch.long, "device": self._device}
        self._cache = KeyValues(self._inner, rows, length)
        self._mask = torch.zeros(rows, length, dtype=self._dtype, device=self._device)
        self._tokens, self._positions, self._row_ids = (torch.zeros(rows, **options) for _ in range(3))
        self._finished = torch.zeros(rows, dtype=torch.bool, device=self._device)
        self._answers = torch.zeros(rows + 1, length, **options)
        self._losses = torch.zeros(rows + 1, length, device=self._device)
        self._column = torch.zeros(1, **options)

    def _size_for(self, num_rows: int) -> int:
        """Rows of a step for `num_rows` answers."""
        if not self._captures:
            return num_rows
        size = self._cache.max_rows
        while size > FEW_ROWS and -(-size // ROW_FACTOR) >= num_rows:
            size = -(-size // ROW_FACTOR)
        return size

    # decoding

    def _decode(self, prompts: list[dict[str, torch.Tensor]]) -> list[Answer]:
        cache = self._cache
        length = self._prefill(prompts)
        cache.rows, cache.capacity = self._size_for(len(prompts)), self._capacity_for(length)
        produced = 1
        while produced < self._max_new_tokens:
            if length == cache.capacity:
                cache.capacity = self._capacity_for(length)
            steps = min(CHECK_EVERY, self._max_new_tokens - produced, cache.capacity - length)
            for _ in range(steps):
                self._advance()
            produced, length = produced + steps, length + steps
            alive = (~self._finished[: cache.rows]).nonzero()[:, 0]  # waits for the GPU
            if not len(alive):
                break
            if self._size_for(len(alive)) < cache.rows:
                self._drop_all_but(alive, length)
        answers = self._answers[: len(prompts), :produced]
        ended = (answers[..., None] == self._ends).any(-1)
        lengths = torch.where(ended.any(1), ended.int().argmax(1) + 1, produced)
        behind = torch.arange(produced, device=self._device) >= lengths[:, None]
        losses = self._losses[: len(prompts), :produced].masked_fill(behind, 0).sum(1, dtype=torch.float64)
        rows = zip(answers.tolist(), lengths.tolist(), losses.tolist(), strict=True)
        return [Answer(row[:end], loss) for row, end, loss in rows]

    def _capacity_for(self, length: int) -> int:
        """Columns that attention reads, with room behind `length`."""
        capacity = LENGTH_STEP
        while capacity <= length:
            capacity *= 2
        return min(capacity, self._cache.length)

    def _prefill(self, prompts: list[dict[str, torch.Tensor]]) -> int:
        """Prompts through the model, and the first token of each answer.

        Returns:
            The column behind the prompts.
        """
        cache, num_rows = self._cache, len(prompts)
        longest = max(len(prompt["input_ids"]) for prompt in prompts)
        self._mask.fill_(float("-inf"))
        self._answers.fill_(self._pad)
        self._column.zero_()
        self._row_ids.fill_(cache.max_rows)
        self._row_ids[:num_rows] = torch.arange(num_rows, device=self._device)
        self._finished.fill_(True)
        self._finished[:num_rows] = False
        start = 0
        for stop in _chunk_ends(prompts):
            self._prefill_rows(prompts[start:stop], start, longest)
            start = stop
        cache.slot.fill_(longest - 1)
        return longest

    def _prefill_rows(self, prompts: list[dict[str, torch.Tensor]], first_row: int, longest: int) -> None:
        lengths = torch.tensor([len(prompt["input_ids"]) for prompt in prompts])
        ends = lengths.cumsum(0)
        rows = torch.arange(len(prompts)).repeat_interleave(lengths)
        columns = torch.arange(int(ends[-1])) - ends[rows] + longest
        positions = torch.cat([prompt["position_ids"] for prompt in prompts], dim=1)
        grids = torch.cat([prompt["image_grid_thw"] for prompt in prompts])
        inputs = {
            "input_ids": torch.cat([prompt["input_ids"] for prompt in prompts])[None],
            "position_ids": positions[:, None],
            "text_cu_seqlens": boundaries(lengths.tolist()),
            "text_max_seqlen": bucketed(int(lengths.max())),
            "logits_to_keep": ends - 1,
            **{key: torch.cat([prompt[key] for prompt in prompts])[None] for key in self._family.token_types},
        }
        if len(grids):
            inputs |= {
                "pixel_values": joined([prompt["pixel_values"] for prompt in prompts]),
                "image_grid_thw": grids,
                **self._tower.told(grids),
            }
        rows, columns = self._send(rows + first_row), self._send(columns)
        self._mask[rows, columns] = 0
        here = slice(first_row, first_row + len(prompts))
        self._positions[here] = self._send(positions[0, ends - 1])
        inputs = {name: self._send(value) if torch.is_tensor(value) else value for name, value in inputs.items()}
        if len(grids):
            inputs["pixel_values"] = self._normalise(inputs["pixel_values"]).to(self._dtype)
        with self._cache.filling(rows, columns):
            logits = self._inner(
                **inputs,
                past_key_values=self._cache,
                use_cache=True,
            ).logits[0]
        self._emit(logits, here)

    def _send(self, tensor: torch.Tensor) -> torch.Tensor:
        """To the device without waiting: it is still busy with the prompts before."""
        if self._device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)

    def _emit(self, logits: torch.Tensor, rows: slice) -> None:
        """Take the best token of each row, (rows, vocabulary) -> `_tokens`, `_answers` and `_losses`."""
        best = logits.argmax(-1)
        tokens = best.masked_fill(self._finished[rows], self._pad)
        self._finished[rows] |= (tokens[:, None] == self._ends).any(1)
        self._tokens[rows] = tokens
        ids = self._row_ids[rows]
        place = ids, self._column.expand_as(ids)
        self._answers.index_put_(place, tokens)
        # -ln p in one pass over the vocabulary, which is float32 inside: nothing of the logits' size is converted
        self._losses.index_put_(place, cross_entropy(logits, best, reduction="none").float())

    def _step(self) -> None:
        """One more token in every row; nothing in here waits for the GPU."""
        cache = self._cache
        rows = slice(0, cache.rows)
        for counter in (cache.slot, self._column, self._positions):
            counter += 1
        self._mask.index_fill_(1, cache.slot, 0)
        hidden = self._text(
            input_ids=self._tokens[rows, None],
            position_ids=self._positions[rows, None].expand(3, -1, -1),
            past_key_values=cache,
            use_cache=True,
            decoding_mask=self._mask[rows, None, None, : cache.capacity],
        ).last_hidden_state
        self._emit(self._head(hidden[:, -1]), rows)

    def _advance(self) -> None:
        """`_step`; as a graph from the second time that a shape occurs."""
        shape = (self._cache.rows, self._cache.capacity)
        if self._captures and shape in self._graphs and self._graphs[shape] is None:
            self._capture(shape)
        graph = self._graphs.setdefault(shape)
        self._step() if graph is None else graph.replay()

    def _capture(self, shape: tuple[int, int]) -> None:
        pool = next((graph.pool() for graph in self._graphs.values() if graph is not None), None)
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: other threads, such as a data loader's, go on meanwhile
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                self._step()
            self._graphs[shape] = graph
        except RuntimeError as error:
            self._captures = False
            logger.warning(f"decoding is not captured as CUDA graphs, which is slower ({str(error).splitlines()[0]})")
            torch.cuda.synchronize()

    def _drop_all_but(self, alive: torch.Tensor, length: int) -> None:
        """Move the rows that have not ended to the front, and go on with fewer."""
        num_rows = len(alive)
        self._cache.move(alive, length)
        for tensor in (self._mask, self._tokens, self._positions, self._row_ids):
            tensor[:num_rows] = tensor[alive]
        self._finished.fill_(True)
        self._finished[:num_rows] = False
        self._row_ids[num_rows:] = self._cache.max_rows
        self._cache.rows = self._size_for(num_rows)


class KeyValues:
    """Keys and values of all layers in one tensor: what the attention layers take for transformers' cache.

    Args:
        model: the transformers model.
        rows: answers at once.
        length: columns, of prompt and answer together.
    """

    def __init__(self, model: Any, rows: int, length: int) -> None:
        layers, heads, head_dim = _shape(model.config.text_config)
        shape = (layers, 2, rows, heads, length, head_dim)
        # zeros: columns that no row has filled are masked, but must be finite numbers
        self._store = torch.zeros(shape, dtype=activation_dtype(model), device=model.device)
        self.slot = torch.zeros(1, dtype=torch.long, device=model.device)  # the column that a step fills
        self.max_rows, self.length = rows, length
        self.rows, self.capacity = rows, length  # what a step reads
        self._place: tuple[torch.Tensor, torch.Tensor] | None = None

    @staticmethod
    def row_bytes(model: Any, length: int) -> int:
        """Memory of one answer."""
        layers, heads, head_dim = _shape(model.config.text_config)
        return 2 * layers * heads * head_dim * length * activation_dtype(model).itemsize

    @contextmanager
    def filling(self, rows: torch.Tensor, columns: torch.Tensor) -> Iterator[None]:
        """Inside, token i of a flattened row of prompts goes to rows[i] and columns[i]."""
        self._place = (rows, columns)
        try:
            yield
        finally:
            self._place = None

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Called by the attention layers: store what is new, return what is to be attended to.

        Args:
            key: (1, heads, tokens, head_dim) of prompts, or (rows, heads, 1, head_dim) of a step.
            value: as `key`.
            layer_idx: number of the layer.
        """
        if self._place is not None:
            rows, columns = self._place
            for stored, new in zip(self._store[layer_idx], (key, value), strict=True):
                stored[rows, :, columns] = new[0].transpose(0, 1)
            return key, value
        stored = self._store[layer_idx, :, : self.rows]
        stored[0].index_copy_(2, self.slot, key)
        stored[1].index_copy_(2, self.slot, value)
        return stored[0, :, :, : self.capacity], stored[1, :, :, : self.capacity]

    def move(self, rows: torch.Tensor, length: int) -> None:
        """Move `rows` to the front, up to column `length`."""
        for layer in self._store:
            layer[:, : len(rows), :, :length] = layer[:, rows, :, :length]


def _shape(config: Any) -> tuple[int, int, int]:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, config.num_key_value_heads, head_dim


def _prompts(batch: dict[str, torch.Tensor], merge_size: int, family: Family) -> list[dict[str, torch.Tensor]]:
    """The rows of a collated batch, without padding and with positions."""
    grids, pixels = batch["image_grid_thw"], batch["pixel_values"]
    patches, first, at, prompts = grids.prod(dim=1).tolist(), 0, 0, []
    for row, keep in enumerate(batch["attention_mask"].bool()):
        types = batch["mm_token_type_ids"][row, keep]
        wanted, last, end = int(types.count_nonzero()) * merge_size**2, first, at
        while end - at < wanted:
            end, last = end + patches[last], last + 1
        positions = (
            batch["position_ids"][:, row, keep]
            if "position_ids" in batch
            else _positions(types.numpy().tobytes(), tuple(map(tuple, grids[first:last].tolist())), merge_size)
        )
        prompts.append({
            "input_ids": batch["input_ids"][row, keep],
            "position_ids": positions,
            "pixel_values": pixels[at:end],
            "image_grid_thw": grids[first:last],
            **{key: batch[key][row, keep] for key in family.token_types},
        })  # fmt: skip
        first, at = last, end
    return prompts


@functools.lru_cache(maxsize=1024)
def _positions(types: bytes, grids: tuple[tuple[int, ...], ...], merge_size: int) -> torch.Tensor:
    """`rope_positions`, computed once for all pictures of a size."""
    return rope_positions(
        torch.frombuffer(bytearray(types), dtype=torch.long), torch.tensor(grids).view(-1, 3), merge_size
    )


def _chunk_ends(prompts: list[dict[str, torch.Tensor]]) -> Iterator[int]:
    """Where to cut a list of prompts so that each part has at most `PREFILL_PATCHES` patches, or one prompt."""
    patches = 0
    for number, prompt in enumerate(prompts):
        size = len(prompt["pixel_values"])
        if patches and patches + size > PREFILL_PATCHES:
            yield number
            patches = 0
        patches += size
    yield len(prompts)


def decoding_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    decoding_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one new token a row to the cache; prompts and images go to `varlen_attention`.

    Query heads that share a key head become query positions, so that keys are read once and not repeated.

    Args:
        module: the attention layer.
        query: (rows, heads, 1, head_dim).
        key: (rows, key_value_heads, columns, head_dim).
        value: as `key`.
        attention_mask: None; transformers makes none for an attention of this name.
        scaling: factor of the scores.
        decoding_mask: (rows, 1, 1, columns), added to the scores: 0 or minus infinity.
        kwargs: for `varlen_attention`.
    """
    if decoding_mask is None:
        return varlen_attention(module, query, key, value, attention_mask, scaling, **kwargs)
    rows, heads, _, head_dim = query.shape
    query = query.reshape(rows, key.shape[1], -1, head_dim)
    output = scaled_dot_product_attention(query, key, value, attn_mask=decoding_mask, scale=scaling)
    return output.reshape(rows, 1, heads, head_dim), None


def _is_plain_lora(layer: torch.nn.Module) -> bool:
    """Whether `_short` computes what this layer does."""
    return (
        isinstance(layer, LoraLinear)
        and type(layer.base_layer) is torch.nn.Linear
        and len(layer.active_adapters) == 1
        and layer.active_adapters[0] in layer.lora_A
        and not (layer.merged or layer.disable_adapters or layer.lora_variant or any(layer.lora_bias.values()))
    )


def _short(layer: LoraLinear) -> Any:
    """The forward function of a LoRA layer in three products, the adapter in the type of the frozen weight.

    peft casts input and output where the adapter is kept in float32, and scales and adds in kernels of their own.
    """
    (name,) = layer.active_adapters
    dtype = layer.base_layer.weight.dtype
    a, b = (part[name].weight.detach().to(dtype) for part in (layer.lora_A, layer.lora_B))
    return functools.partial(_lora_forward, layer.base_layer, a, b.T, layer.scaling[name])


def _lora_forward(
    base: torch.nn.Linear, a: torch.Tensor, b: torch.Tensor, scaling: float, x: torch.Tensor
) -> torch.Tensor:
    y = base(x)
    down = linear(x, a).flatten(0, -2)
    return torch.addmm(y.flatten(0, -2), down, b, alpha=scaling).view_as(y)


# No mask function is registered on purpose, as in latexocr.attention.
AttentionInterface.register(DECODING, decoding_attention)
