"""Held-out loss of the current weights."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsetrain.data import NOT_COUNTED, Batch, Dataset
from sparsetrain.parallel import World
from sparsetrain.training.perplexity import perplexity

LossOf = Callable[[Batch], Tensor]
"""A batch to the sum of the losses over its counted targets, 0-d."""


@dataclass(frozen=True)
class EvalResult:
    """Means over the held-out tokens that were read."""

    loss: float
    """Nats a token."""
    bits_per_byte: float
    num_tokens: int

    @property
    def perplexity(self) -> float:
        """e^loss, a token."""
        return perplexity(self.loss)


def evaluate(loss_of: LossOf, dataset: Dataset, world: World, *, batch_size: int, max_tokens: int) -> EvalResult | None:
    """Evaluate on held-out text, each sample on one rank; collective.

    Args:
        loss_of: The model.
        dataset: Where the held-out text is.
        world: The ranks.
        batch_size: Samples a rank evaluates at once.
        max_tokens: Held-out tokens to read, about, over all ranks.

    Returns:
        The same on all ranks; None if no text is held out.
    """
    if dataset.num_eval_tokens == 0:
        return None
    sums = torch.zeros(3, dtype=torch.float64)  # loss, targets, bytes
    for batch in dataset.eval_batches(batch_size, max_tokens, rank=world.share, world_size=world.num_shares):
        counted = int((batch.targets != NOT_COUNTED).sum())
        loss = loss_of(batch).item()
        sums += torch.tensor([loss, counted, dataset.target_bytes(batch)], dtype=torch.float64)
    readers = world.size // world.num_shares  # of each share, which all come to the same
    loss_sum, num_targets, num_bytes = (world.sum_(sums.to(world.device)) / readers).tolist()
    return EvalResult(loss_sum / num_targets, loss_sum / math.log(2) / num_bytes, round(num_targets))
