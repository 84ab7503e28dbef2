"""The Trainer: token-mean loss over the whole effective batch, exact validation, checkpoints that hold everything.

What it changes in `transformers.Trainer`, and why:
- the loss is the mean over supervised tokens of the effective batch for every family (stock Trainer decides from
  the model class, so that Qwen2-VL and Qwen2.5-VL differ), and logits exist only at supervised columns;
- every step's set of samples is the same for any number of ranks (stock sharding repeats samples to fill up);
- validation is exact: each row once, loss as token mean, plus generation scored by `latexocr.metrics`, answers kept;
- every checkpoint is written with `latexocr.json`; SIGTERM and Ctrl-C end training with a checkpoint.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import GenerationConfig, PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from latexocr.attention import VARLEN, set_attention
from latexocr.averaging import WeightAverage
from latexocr.card import write_card
from latexocr.checkpoint import LOSS_METER
from latexocr.console import Console
from latexocr.contract import Contract, write_text
from latexocr.dataset import MASKED, FormulaDataset
from latexocr.decoding import decoder_for
from latexocr.errors import InputError
from latexocr.evaluate import quick_scores, write_predictions
from latexocr.generate import Generated, generate
from latexocr.graphs import GradientBuffer, StepGraphs
from latexocr.images import load_image
from latexocr.initialisation import Tensors, read_difference, write_difference
from latexocr.layers import fuse_layers
from latexocr.lora import FusedLoras
from latexocr.loss import detach_head, head_loss, router_loss, supervised_loss, supervised_targets
from latexocr.memory import explain_out_of_memory
from latexocr.modeling import inner_model, save_for_training, save_for_use, save_processor
from latexocr.optimizers import Flat, flatten, parameter_groups
from latexocr.placeholders import trusted_placeholders
from latexocr.preprocess import IGNORED
from latexocr.quantization import PACKAGE
from latexocr.sampling import BudgetSampler, EpochSampler
from latexocr.sharding import check_fsdp, round_as_one_process_does
from latexocr.stopping import StoppedInEvaluation, StopSignal, outlive_stop_signals
from latexocr.streaming import Stream
from latexocr.tracking import Sample
from latexocr.vision_cache import GivenFeatures

logger = logging.getLogger(__name__)
FINAL = {"lora": "adapter", "full": "model"}  # folder of what a training is for
STOCK = "sdpa"  # attention for padded batches and for a growing cache
Collate = Callable[[list[dict]], dict[str, Any]]


class FormulaTrainer(Trainer):
    """See the module's docstring.

    Args:
        contract: written beside every checkpoint.
        generation: greedy settings with `max_new_tokens` for validation.
        stop: the signal watcher, also asked during validation.
        lengths: of the training samples in tokens: ranks get equally many tokens.
        batches: this rank's micro-batches, where they are not of `per_device_train_batch_size` samples.
        eval_collator: padded batches for generation; `data_collator` makes those for training and for losses.
        on_board: called on the main process after every validation with the fixed samples, predictions filled in.
        kwargs: as for `transformers.Trainer`; the datasets are `FormulaDataset`s, for training also a `Stream`.
    """

    def __init__(
        self,
        *,
        contract: Contract,
        generation: GenerationConfig,
        stop: StopSignal,
        on_board: Callable[[list[Sample], int], None],
        eval_collator: Collate,
        lengths: Sequence[int],
        batches: BudgetSampler | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(compute_loss_func=supervised_loss, **kwargs)  # given, so that tokens are counted
        self.eval_collator, self.lengths = eval_collator, lengths
        self._start: Tensors = getattr(self.model, "pissa_start", {})
        self._head = detach_head(self.model) if self.args.fused_loss else None
        if self.args.fused_loss and self._head is None:
            trained = any(weight.requires_grad for weight in self.model.get_output_embeddings().parameters())
            reason = "is trained" if trained else "has a bias or is none that it knows"
            logger.info(f"fused_loss is left out: the output layer {reason}")
        self._loras = FusedLoras(self.model) if self.args.fused_lora else None
        if self.args.fused_layers:
            fuse_layers(self.model)
        self._graphs = StepGraphs(self._captured_loss) if self.args.cuda_graphs else None
        if self._graphs:
            # Not wrapped in DDP, whose hooks hold on to the graph's nodes: one all-reduce follows the replay.
            self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)
        self._gradients: GradientBuffer | None = None
        self._flats: list[Flat] = []
        self._loader: DataLoader | None = None
        self._average = WeightAverage(self.model, self.args.average_weights) if self.args.average_weights else None
        self._micro_batch = 0
        if self.args.flatten:
            set_attention(self.model, VARLEN)
        for printing in (ProgressCallback, PrinterCallback):
            self.remove_callback(printing)
        self.add_callback(Console())
        if self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            check_fsdp(plugin)
            round_as_one_process_does(plugin, adapters=self.args.finetuning == "lora")
        self.contract, self.generation, self.stop, self.on_board = contract, generation, stop, on_board
        self.batches = batches
        self.given_features: GivenFeatures | None = None
        self._sampler: EpochSampler | BudgetSampler | None = batches
        self._resumed_from: str | None = None
        self._weights_step: int | None = None
        self._restart_meter()
        self.add_callback(stop)
        self.add_callback(_Repeatable(self))
        self.add_callback(_NoInputGradients(self))

    # training

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Weights decay, biases and norms do not: told by their shape, because stock Trainer goes by names and
        misses some (`norm1` of Qwen2.5-VL's vision tower). A shard of ZeRO-3 is flat and knows the whole's shape."""
        shapes = {name: getattr(weight, "ds_shape", weight.shape) for name, weight in model.named_parameters()}
        return [name for name, shape in shapes.items() if len(shape) > 1]

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The stock one, with groups of our own where learning rates differ."""
        if self.optimizer is None and (self.args.learning_rates or self.args.loraplus_lr_ratio):
            trained = self.model if model is None else model
            optimizer, options = self.get_optimizer_cls_and_kwargs(self.args, trained)
            groups = parameter_groups(
                trained, self.train_dataset.preprocessor.family, self.args, weight_decay=self.args.weight_decay,
                decaying=self.get_decay_parameter_names(trained),
            )  # fmt: skip
            # groups under this name take the place of stock Trainer's two
            self.optimizer_cls_and_kwargs = (optimizer, {**options, "params": groups})
        super().create_optimizer(*(() if model is None else (model,)))
        if self._steps_one_by_one and not self._flats:
            self._flats = flatten(self.optimizer)
        return self.optimizer

    @property
    def _steps_one_by_one(self) -> bool:
        """Whether hundreds of small parameters would be stepped one by one, and the gradients' places are ours."""
        alone = self._graphs is not None or self.args.world_size == 1
        ours = alone and self.args.finetuning == "lora" and not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        return ours and type(self.optimizer).__module__.startswith(PACKAGE)

    def _get_train_sampler(self, train_dataset: FormulaDataset | None = None) -> EpochSampler:
        self._sampler = EpochSampler(
            self.lengths,
            batch_size=self.args.per_device_train_batch_size,
            ranks=self.args.world_size,
            seed=self.args.data_seed if self.args.data_seed is not None else self.args.seed,
        )
        return self._sampler

    def get_train_dataloader(self) -> DataLoader:
        """The stock loader with workers that survive a signal to the whole job."""
        if isinstance(self.train_dataset, Stream):
            self._sampler = self.train_dataset
            return self._own_loader(batch_size=None, collate_fn=_as_it_is)
        if self.batches is not None:
            return self._own_loader(batch_sampler=self.batches, collate_fn=self.data_collator)
        loader = super().get_train_dataloader()
        self._loader = inner = loader.base_dataloader  # accelerate iterates over this one
        inner.worker_init_fn = partial(outlive_stop_signals, then=inner.worker_init_fn)
        # Starting workers draws a number, in a resumed run more often: not from the generator that dropout uses.
        inner.generator = torch.Generator()
        return loader

    def _own_loader(self, **batches: Any) -> DataLoader:
        """Every rank has its own batches: accelerate only moves them to the device, as one process of one."""
        self._loader = loader = DataLoader(
            self.train_dataset,
            **batches,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            worker_init_fn=outlive_stop_signals,
            generator=torch.Generator(),  # see get_train_dataloader
        )
        return prepare_data_loader(
            loader,
            self.args.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            dispatch_batches=False,
            non_blocking=self.accelerator.non_blocking,
        )

    def get_batch_samples(self, *args: Any) -> tuple[list, Any]:
        """A step's micro-batches; the time that training stands still for them is counted."""
        started = time.perf_counter()
        batches = super().get_batch_samples(*args)
        self._waited += time.perf_counter() - started
        return batches

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of one micro-batch; replayed as a CUDA graph where that is possible."""
        with explain_out_of_memory(inputs, by_budget=self.args.by_budget):
            return self._step(model, inputs, num_items_in_batch)

    def _step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> torch.Tensor:
        if self._loras:
            self._loras.reseed(self._dropout_seed())
        self._micro_batch = 0 if self.accelerator.sync_gradients else self._micro_batch + 1
        if self._gradients is None and (self._graphs or self._flats):
            self.model.train()  # once: it goes through thousands of modules
            parts = [part for flat in self._flats for part in flat.parts]
            parameters = parts or [p for p in self.model.parameters() if p.requires_grad]
            self._gradients = GradientBuffer(parameters, [flat.whole for flat in self._flats])
        if self._gradients:
            self._gradients.attach()
        if self._graphs is None:
            return super().training_step(model, inputs, num_items_in_batch)
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()  # schedule-free optimisers
        inputs = self._counted(self._prepare_inputs(inputs))
        loss = self._graphs(inputs, num_items_in_batch)
        if self.args.world_size > 1 and self.accelerator.sync_gradients:
            torch.distributed.all_reduce(self._gradients.flat)
            if not self.args.average_tokens_across_devices:
                self._gradients.flat /= self.args.world_size
        # logged losses are averaged over the ranks
        return loss * self.args.world_size if self.args.average_tokens_across_devices else loss

    def _clip_grad_norm(self, model: Any) -> torch.Tensor:
        if self._gradients is None:
            return super()._clip_grad_norm(model)
        return self._gradients.clip(self.args.max_grad_norm)

    def _dropout_seed(self) -> int:
        """Another one for every micro-batch and rank of the run; the same again when the run is resumed."""
        numbers = (self.args.seed, self.state.global_step, self._micro_batch, self.args.process_index)
        return hash(numbers) % 2**63

    def _captured_loss(self, inputs: dict[str, Any], num_items: torch.Tensor) -> torch.Tensor:
        return self._loss(self.model, inputs, num_items)[0]

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Pictures travel as bytes and become numbers on the device."""
        inputs = super()._prepare_inputs(inputs)
        if "pixel_values" in inputs:
            dtype = torch.bfloat16 if self.args.bf16 else None
            inputs["pixel_values"] = self.train_dataset.preprocessor.normalise(inputs["pixel_values"], dtype)
        return inputs

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean over supervised tokens of the effective batch; see `latexocr.loss`."""
        if num_items_in_batch is None:
            num_items_in_batch = (inputs["labels"][:, 1:] != IGNORED).sum().clamp(min=1)
        loss, outputs = self._loss(model, self._counted(inputs), num_items_in_batch)
        if self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # the gradients are averaged over the ranks
        return (loss, outputs) if return_outputs else loss

    def _counted(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """`inputs` for the model; the numbers of samples and tokens go to the meter."""
        inputs = dict(inputs)
        self._samples += inputs.pop("num_samples", len(inputs["labels"]))
        # a sum on the device is not waited for
        self._tokens += inputs.pop("num_tokens") if "num_tokens" in inputs else inputs["attention_mask"].sum()
        return inputs

    def _loss(self, model: Any, inputs: dict[str, Any], num_items: Any) -> tuple[torch.Tensor, Any]:
        inputs = dict(inputs)
        targets = supervised_targets(inputs.pop("labels"), inputs["logits_to_keep"])
        if "image_features" in inputs:  # the tower hands them on, see `GivenFeatures`
            inputs["pixel_values"] = inputs.pop("image_features")
        if self._loras:
            self._loras.prepare()
        if isinstance(inputs["image_grid_thw"], tuple):
            inputs["image_grid_thw"] = torch.tensor(inputs["image_grid_thw"])  # on the CPU, where it is read
        with trusted_placeholders(self.model):
            outputs = model(**inputs, use_cache=False)
        if self._head is None:
            loss = supervised_loss(outputs.logits, targets, num_items)
        else:
            loss = head_loss(outputs.logits, self._head, targets, num_items)
        if self.model.training and outputs.get("aux_loss") is not None:  # validation is about tokens
            loss = loss + router_loss(outputs, inner_model(self.model).config, targets, num_items)
        return loss, outputs

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: walking over all parameters at every micro-batch costs more than the number is worth."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds throughput and waiting since the last log and peak memory to every line with a training loss."""
        if "train_loss" in logs:  # stock Trainer counts only the part since resuming
            logs["train_loss"] = self.mean_loss()
        if "loss" in logs:
            seconds = time.perf_counter() - self._since
            counts = torch.tensor([int(self._tokens), self._samples], device=self.args.device)
            tokens, samples = self.accelerator.reduce(counts, reduction="sum").tolist()
            logs["tokens_per_second"] = round(tokens / seconds, 1)
            logs["samples_per_second"] = round(samples / seconds, 2)
            logs["waiting_for_data"] = round(self._waited / seconds, 4)  # share of the time, main process
            if self.args.device.type == "cuda":
                logs["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
                logs["reserved_memory_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 3)
            self._restart_meter()
        super().log(logs, start_time)

    def mean_loss(self) -> float:
        """Mean loss over all steps of the run, resumed or not: logged means, and the steps since the last log."""
        total, last = float(self._tr_loss), 0
        for line in self.state.log_history:
            if "loss" in line:
                total += line["loss"] * (line["step"] - last)
                last = line["step"]
        return total / max(1, self.state.global_step)

    def _restart_meter(self) -> None:
        self._tokens, self._samples, self._since, self._waited = 0, 0, time.perf_counter(), 0.0

    # validation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss over all validation rows, generation over evenly spaced ones; the same numbers on every rank."""
        dataset: FormulaDataset = eval_dataset if eval_dataset is not None else self.eval_dataset
        started = time.perf_counter()
        rows = spread(len(dataset), self.args.eval_generate_samples)
        with self._average.applied() if self._average else nullcontext():
            with self._as_for_inference(VARLEN if self.args.flatten else STOCK):
                metrics = {f"{metric_key_prefix}_loss": self._validation_loss(dataset)}
            with self._as_for_inference(STOCK), without_autocast(inner_model(self.model)):
                answers = self._generate_rows(dataset, rows) if rows else {}
        if rows:
            scores = self._scores(dataset, answers)
            metrics |= {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
            self._show_board(dataset, rows, answers)
        metrics[f"{metric_key_prefix}_runtime"] = round(time.perf_counter() - started, 3)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._restart_meter()
        return metrics

    @contextmanager
    def _as_for_inference(self, attention: str) -> Iterator[None]:
        """Evaluation mode, images from pixels; stock attention for padded batches."""
        training = self.model.training
        self.model.eval()
        if self.args.flatten:
            set_attention(self.model, attention)
        try:
            with self.given_features.paused() if self.given_features else nullcontext():
                yield
        finally:
            if self.args.flatten:
                set_attention(self.model, VARLEN)
            self.model.train(training)

    @torch.no_grad()
    def _validation_loss(self, dataset: FormulaDataset) -> float:
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)  # sum of losses, supervised tokens
        collate = replace(self.data_collator, round_up=False) if self.args.flatten else self.eval_collator
        if self._head is not None:
            self.model.get_output_embeddings().train()  # the loss is computed from its input, as in training
        for batch in self._my_share(dataset, range(len(dataset)), "validation loss", collate):
            inputs = self._counted(self._prepare_inputs(batch))
            total[1] += (inputs["labels"][:, 1:] != IGNORED).sum()
            total[0] += self._loss(self.model, inputs, 1)[0]
        loss_sum, num_tokens = self.accelerator.reduce(total, reduction="sum").tolist()
        return loss_sum / num_tokens

    def _generate_rows(self, dataset: FormulaDataset, rows: list[int]) -> dict[int, Generated]:
        """Answers by row, generated by all ranks together, each row once."""
        mine: list[Generated] = []
        # Sharded parameters (FSDP, ZeRO-3) are gathered in every forward: all ranks must generate equally long.
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        batches = self._my_share(_Prompts(dataset), rows, "generation", self.eval_collator)
        with nullcontext() if sharded else decoder_for(self.model, self.generation) as decoder:
            # loaded in small batches, so that workers share the work, and decoded in large ones
            at_once = max(1, self.args.generate_batch_size // self.args.per_device_eval_batch_size) if decoder else 1
            while group := list(islice(batches, at_once)):
                mine += generate(
                    self.model, group, dataset.preprocessor, self.generation, decoder=decoder, synced_gpus=sharded
                )
        share = share_of(rows, self.args.process_index, self.args.world_size)
        pairs = [pair for pair in zip(share, mine, strict=True) if pair[0] != MASKED]
        if self.args.world_size > 1:
            gathered: list[Any] = [None] * self.args.world_size
            torch.distributed.all_gather_object(gathered, pairs)
            pairs = [pair for part in gathered for pair in part]
        return dict(pairs)

    def _scores(self, dataset: FormulaDataset, answers: dict[int, Generated]) -> dict[str, float]:
        """Metrics of the answers, which are written beside the checkpoints; pictures only where they decide."""
        scores: list[Any] = [None]
        if self.is_world_process_zero():
            predictions = [answer.as_row(dataset.records[row]) for row, answer in sorted(answers.items())]
            scores = [
                quick_scores(predictions, pictures=self.args.picks_by_pictures, answer_format=self.args.answer_format)
            ]
            path = validation_file(Path(self.args.output_dir), self.state.global_step)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_predictions(path, predictions)
        if self.args.world_size > 1:
            torch.distributed.broadcast_object_list(scores, src=0)
        if self.args.picks_by_pictures and self.args.best_metric not in scores[0]:
            raise InputError(
                f"metric_for_best_model is {self.args.best_metric}, but no reference of the validation renders; "
                "choose a text metric such as edit_distance, or see latexocr doctor"
            )
        return scores[0]

    def _my_share(self, dataset: Any, rows: Sequence[int], description: str, collate: Collate) -> Iterator[Any]:
        """Batches of this rank's rows; as many on every rank. A stop signal leaves a checkpoint and raises."""
        loader = DataLoader(
            dataset,
            sampler=share_of(list(rows), self.args.process_index, self.args.world_size),
            batch_size=self.args.per_device_eval_batch_size,
            collate_fn=collate,
            num_workers=self.args.dataloader_num_workers,
            worker_init_fn=outlive_stop_signals,
            generator=torch.Generator(),  # the global one belongs to training: resumed runs must repeat it
        )
        for batch in tqdm(
            loader,
            desc=description,
            leave=False,
            disable=self.args.disable_tqdm or not self.is_world_process_zero(),
        ):
            if self.is_in_train and self.stop.agreed(self.args.world_size, self.args.device):
                self._save_checkpoint(self.model_wrapped, trial=None)
                raise StoppedInEvaluation
            yield batch

    def _show_board(self, dataset: FormulaDataset, rows: list[int], answers: dict[int, Generated]) -> None:
        if not self.is_world_process_zero():
            return
        board = []
        for row in rows[: self.args.board_samples]:
            record = dataset.records[row]
            shown = next((one for one in record.media if one.kind == "image"), None)
            if shown is None:
                continue
            picture = load_image(shown.load(record.where), record.where)
            board.append(Sample(image=picture, prediction=answers[row].text, reference=record.text, id=record.id))
        self.on_board(board, self.state.global_step)

    # checkpoints

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Adds the losses since the last log line, so that a resumed run logs what an uninterrupted one does."""
        loss_sum = float(self.accelerator.reduce(self._tr_loss.clone(), reduction="mean"))
        if self._average:
            self._average.restore()  # a signal has come in the middle of a validation
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            meter = {"loss_sum": loss_sum, "since_step": self._globalstep_last_logged}
            write_text(folder / LOSS_METER, json.dumps(meter) + "\n")
            if self._average:
                self._average.save(folder)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        self._resumed_from, self._weights_step = resume_from_checkpoint, None
        try:
            output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:  # workers that live on are told to end; at its exit PyTorch would wait five seconds for each
            if self._loader is not None:
                self._loader._iterator = None
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint:
            self._weights_step = self.state.best_global_step  # the weights are the best checkpoint's now
        if self._average:
            self._average.apply()
        return output

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self._start:
            read_difference(self.model, Path(resume_from_checkpoint), self._start)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self._start:
            read_difference(self.model, Path(self.state.best_model_checkpoint), self._start)
        else:
            super()._load_best_model()
        if self._average:
            self._average.load(Path(self.state.best_model_checkpoint))

    def update_average(self) -> None:
        """Called after every step."""
        if self._average:
            self._average.update(self.state.global_step)

    def restore_from_checkpoint(self) -> None:
        """Called when training begins, after stock Trainer has loaded the weights and set the loss meter to zero."""
        if self.given_features:
            self.given_features.park()
        if self._average:
            self._average.load(Path(self._resumed_from) if self._resumed_from else None)
        if isinstance(self.train_dataset, Stream):
            self.train_dataset.first_batch = self.state.global_step * self.args.gradient_accumulation_steps
        path = Path(self._resumed_from or "") / LOSS_METER
        if self._resumed_from and path.is_file():
            meter = json.loads(path.read_text(encoding="utf-8"))
            self._tr_loss.fill_(meter["loss_sum"])
            self._globalstep_last_logged = meter["since_step"]

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        if self.args.finetuning == "lora":
            super()._save(output_dir, state_dict=state_dict)
            if self._start and self.args.should_save:
                write_difference(folder, self._start)
        elif self.args.should_save:
            save = save_for_training if self.is_in_train else save_for_use
            save(inner_model(self.model), folder, state_dict)
            save_processor(self.processing_class, folder, self.contract.image_policy)
        if self.args.should_save:
            self.current_contract().save(folder)
            write_card(folder)  # in place of peft's, which knows nothing of the run

    def current_contract(self) -> Contract:
        """The contract with the step and the evaluation that belong to the weights as they are now."""
        step = self._weights_step or self.state.global_step
        evaluations = [line for line in self.state.log_history if "eval_loss" in line and line["step"] <= step]
        training = {**self.contract.training, "step": step}
        if not evaluations:
            return replace(self.contract, training=training)
        training["evaluation"] = evaluations[-1]
        exponent = evaluations[-1].get("eval_confidence_exponent", 1.0)
        threshold = evaluations[-1].get("eval_min_confidence")
        return replace(
            self.contract,
            training=training,
            confidence_exponent=exponent,
            min_confidence=None if threshold is None else threshold**exponent,
        )


@contextmanager
def without_autocast(model: Any) -> Iterator[None]:
    """`model` computes in the type of its weights, as the decoder's memory needs it; accelerate has put a `forward`
    under autocast in its place."""
    wrapped = vars(model).pop("forward", None)
    try:
        yield
    finally:
        if wrapped is not None:
            model.forward = wrapped


def validation_file(output_dir: Path, step: int) -> Path:
    """Where the answers of a validation are."""
    return output_dir / "validation" / f"step-{step}.jsonl"


class _Repeatable(TrainerCallback):
    """What a run needs to repeat itself exactly: the loss meter, the weights' average, and the epoch of sampler and
    data (accelerate's wrappers forward `set_epoch` only in some versions)."""

    def __init__(self, trainer: FormulaTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.restore_from_checkpoint()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.update_average()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        epoch = int((state.epoch or 0) + 1e-6)
        self.trainer._sampler.epoch = epoch
        self.trainer.train_dataset.set_epoch(epoch)


class _NoInputGradients(TrainerCallback):
    """Undoes what transformers does for reentrant checkpointing: embeddings and patches that require gradients.

    A frozen vision tower would be differentiated for nothing, and the host would wait for the GPU on the way.
    """

    def __init__(self, trainer: FormulaTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        inner_model(self.trainer.model).disable_input_require_grads()


def _as_it_is(batch: dict[str, Any]) -> dict[str, Any]:
    """PyTorch would make lists of tuples."""
    return batch


class _Prompts(torch.utils.data.Dataset):
    """The prompts of a dataset's rows, for generation."""

    def __init__(self, dataset: FormulaDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        record = self.dataset.records[0 if row == MASKED else row]
        return self.dataset.preprocessor.prompt_of(record, as_bytes=True)


def spread(num_rows: int, num_chosen: int) -> list[int]:
    """At most `num_chosen` row numbers, evenly spaced over `num_rows`: the same at every validation.

    >>> spread(10, 4)
    [0, 2, 5, 7]
    """
    num_chosen = min(num_rows, num_chosen)
    return [index * num_rows // num_chosen for index in range(num_chosen)]


def share_of(rows: list[int], rank: int, world_size: int) -> list[int]:
    """Every `world_size`-th row, filled with `MASKED` so that all ranks get equally many.

    >>> share_of([10, 11, 12], rank=1, world_size=2)
    [11, -1]
    """
    mine = rows[rank::world_size]
    return mine + [MASKED] * (-(-len(rows) // world_size) - len(mine))
