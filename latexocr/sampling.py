"""Which samples make a micro-batch: a fixed number of them, or as many as fit into a budget of tokens and patches."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Sequence
from math import inf

import torch
from torch.utils.data import Sampler

from latexocr.dataset import MASKED, Selection
from latexocr.errors import InputError

PROBED_EPOCHS = 4  # the most micro-batches that one of them needs are the length of every epoch
LOOKAHEAD = 32  # samples that may be passed over for smaller ones before a micro-batch counts as full
FILL = 0.99  # of the budget where there are several ranks: evening them out needs room

Batches = list[list[int]]  # one micro-step: a list of samples for each rank


class EpochSampler(Sampler[int]):
    """A seeded permutation an epoch, padded with `MASKED` to a whole number of steps on every rank.

    Why: accelerate deals whole batches to the ranks and repeats samples where they do not divide. Padding with
    samples that carry no supervised token keeps each step's set of samples, and so its loss and gradient, the
    same for any number of ranks. Within a step, samples are dealt so that no rank waits for another's longer formulas.

    Args:
        lengths: of the samples in tokens.
        batch_size: samples of a rank and micro-batch.
        ranks: among which a step's micro-batches are dealt, one after the other.
        seed: of the permutations.
    """

    def __init__(self, lengths: Sequence[int], *, batch_size: int = 1, ranks: int = 1, seed: int) -> None:
        self.lengths, self.batch_size, self.ranks = lengths, batch_size, ranks
        self.multiple = batch_size * ranks if ranks > 1 else 1
        self.seed, self.epoch = seed, 0

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.multiple) * self.multiple

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        order += [MASKED] * (len(self) - len(order))
        if self.ranks == 1:
            return iter(order)
        steps = (order[start : start + self.multiple] for start in range(0, len(order), self.multiple))
        return itertools.chain.from_iterable(itertools.chain(*self._dealt(step)) for step in steps)

    def _dealt(self, samples: list[int]) -> list[list[int]]:
        """Equally many samples for each rank, the longest first to the rank with the fewest tokens."""
        hands: list[list[int]] = [[] for _ in range(self.ranks)]
        totals = [0] * self.ranks
        for sample in sorted(samples, key=self._length, reverse=True):
            open_hands = [rank for rank in range(self.ranks) if len(hands[rank]) < self.batch_size]
            rank = min(open_hands, key=totals.__getitem__)
            hands[rank].append(sample)
            totals[rank] += self._length(sample)
        return hands

    def _length(self, sample: int) -> int:
        return int(self.lengths[0 if sample == MASKED else sample])  # the first sample stands in for a masked one


class BudgetSampler(Sampler[list[int]]):
    """This rank's micro-batches of an epoch: as many samples each as fit into a budget of tokens and patches.

    Why: a fixed number of samples must leave room for the longest ones, so most steps use a part of the GPU, and
    ranks wait for the one that drew long formulas. Here a micro-step is filled for all ranks together from one seeded
    shuffle, each sample going to the emptiest rank; one that does not fit waits for the next step while a few
    others are tried. Then the step's samples are dealt again, largest first, so that tokens and patches are even.

    Every epoch holds each sample once and has the same number of micro-batches, because Trainer asks once and
    derives the schedule from it. A plan that comes out shorter has its fullest steps halved, a longer one is shuffled
    again. Nothing depends on how many epochs are planned, so a resumed run may be made longer.

    Args:
        selection: measured records.
        patches_per_token: vision patches that are merged into one image token.
        max_tokens: of a device and micro-batch; None for no bound.
        max_patches: as `max_tokens`.
        rank: whose micro-batches are iterated over.
        world_size: ranks that step together.
        seed: of the order; the epoch is added.

    Raises:
        InputError: a record that is larger than the budget.
    """

    def __init__(
        self,
        selection: Selection,
        *,
        patches_per_token: int,
        max_tokens: int | None,
        max_patches: int | None,
        rank: int,
        world_size: int,
        seed: int,
    ) -> None:
        self.sizes = list(
            zip(selection.counts.total.tolist(), (selection.counts.image * patches_per_token).tolist(), strict=True)
        )
        self.limits = (max_tokens or inf, max_patches or inf)
        self.rank, self.world_size, self.seed, self.epoch = rank, world_size, seed, 0
        for column, name in enumerate(("tokens", "patches")):
            largest = max(range(len(self.sizes)), key=lambda sample: self.sizes[sample][column])
            if self.sizes[largest][column] > self.limits[column]:
                raise InputError(
                    f"{selection.records[largest].where} has {self.sizes[largest][column]:,} {name}, more than "
                    f"max_{name}_per_batch {self.limits[column]:,}: raise it, or leave such records out with a "
                    "lower --max_length"
                )
        self._num_steps = max(len(self._pack(self._order(epoch, 0))) for epoch in range(PROBED_EPOCHS))

    def __len__(self) -> int:
        return self._num_steps

    def __iter__(self) -> Iterator[list[int]]:
        for batches in self.plan(self.epoch):
            yield batches[self.rank] or [MASKED]

    def plan(self, epoch: int) -> Iterator[Batches]:
        """All micro-steps of an epoch, the same on every rank."""
        plans = (self._pack(self._order(epoch, attempt)) for attempt in itertools.count())
        steps = next(plan for plan in plans if len(plan) <= len(self))
        while len(steps) < len(self):
            fullest = max(range(len(steps)), key=lambda number: sum(map(len, steps[number])))
            steps[fullest : fullest + 1] = halved(steps[fullest])
        yield from map(self._evened, steps)

    def _order(self, epoch: int, attempt: int) -> list[int]:
        # far apart, but within the 32 bits of a seed that the CPU's generator looks at
        generator = torch.Generator().manual_seed(self.seed + epoch + 1_000_003 * attempt)
        return torch.randperm(len(self.sizes), generator=generator).tolist()

    def _pack(self, order: list[int]) -> list[Batches]:
        samples, waiting, steps = iter(order), [], []
        while True:
            batches, waiting = self._fill(itertools.chain(waiting, samples))
            if not any(batches):
                return steps
            steps.append(batches)

    def _fill(self, samples: Iterator[int]) -> tuple[Batches, list[int]]:
        """One micro-step, and the samples that were passed over."""
        share = FILL if self.world_size > 1 else 1
        max_tokens, max_patches = (limit * share for limit in self.limits)
        batches: Batches = [[] for _ in range(self.world_size)]
        loads = [(0.0, rank, 0, 0) for rank in range(self.world_size)]  # fullness, rank, tokens, patches: a heap
        passed_over: list[int] = []
        for sample in samples:
            _, rank, tokens, patches = loads[0]
            tokens, patches = tokens + self.sizes[sample][0], patches + self.sizes[sample][1]
            fullness = max(tokens / max_tokens, patches / max_patches)
            if fullness <= 1 or not batches[rank]:
                batches[rank].append(sample)
                heapq.heapreplace(loads, (fullness, rank, tokens, patches))
            else:
                passed_over.append(sample)
                if len(passed_over) == LOOKAHEAD:
                    break
        return batches, passed_over

    def _evened(self, batches: Batches) -> Batches:
        """The same samples dealt again, largest first, so that tokens and patches are even; as before if unfit."""
        chosen = [sample for batch in batches for sample in batch]
        all_tokens, all_patches = (sum(self.sizes[sample][column] for sample in chosen) for column in (0, 1))

        def load(tokens: int, patches: int) -> tuple[bool, float]:
            too_much = tokens > self.limits[0] or patches > self.limits[1]
            return too_much, max(tokens / all_tokens, patches / all_patches)

        evened: Batches = [[] for _ in batches]
        sums = [(0, 0)] * len(batches)
        for sample in sorted(chosen, key=lambda sample: load(*self.sizes[sample]), reverse=True):
            tokens, patches = self.sizes[sample]
            after = [(sum_[0] + tokens, sum_[1] + patches) for sum_ in sums]
            rank = min(range(len(after)), key=[load(*sum_) for sum_ in after].__getitem__)
            sums[rank] = after[rank]
            evened[rank].append(sample)
        return batches if any(load(*sum_)[0] for sum_ in sums) else evened


def halved(step: list[list[int]]) -> list[list[list[int]]]:
    """Two micro-steps out of one, neither of them empty where there are two samples.

    >>> halved([[1, 2, 3], [4]])
    [[[1, 3], []], [[2], [4]]]
    """
    halves: list[list[list[int]]] = [[[] for _ in step] for _ in range(2)]
    turn = itertools.cycle(halves)
    for rank, batch in enumerate(step):
        for sample in batch:
            next(turn)[rank].append(sample)
    return halves
