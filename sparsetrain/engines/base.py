"""The protocol between the training loop and whatever library moves the weights."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from sparsetrain.config import OptimizerConfig
from sparsetrain.data import Batch
from sparsetrain.parallel import MoEController
from sparsetrain.sharding import WeightShard


class Engine(Protocol):
    """A model with its optimizer, laid over ranks. All methods but the properties are collective."""

    @property
    def module(self) -> nn.Module:
        """The bare model, whose parameters `weight_shards` describes."""
        ...

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer of the current phase; its step hooks run before any gather of updated weights."""
        ...

    @property
    def experts(self) -> MoEController | None:
        """Follows the optimizer's steps and looks after the experts in between; None for a model that has none.
        `use_optimizer` makes a new one."""
        ...

    @property
    def aux_loss(self) -> Tensor | None:
        """What balance and router losses added to the loss of the latest `forward_backward`, a counted target: 0-d
        float32, the same on all ranks; None for a model without experts."""
        ...

    def use_optimizer(self, config: OptimizerConfig, *, keep_state: bool) -> None:
        """Begin a phase: new hyperparameters, and Adam's moments and step count kept or forgotten."""
        ...

    def forward_backward(self, micro_batches: Sequence[Batch]) -> Tensor:
        """Leave the gradient of the mean loss over the global batch, `aux_loss` included, in the shards.

        Args:
            micro_batches: This rank's samples of the step, equally many micro-batches on every rank.

        Returns:
            The mean cross entropy over all counted targets of all ranks: 0-d float32, nats a token.
        """
        ...

    def clip(self, max_norm: float | None) -> Tensor:
        """Scale the gradient down to `max_norm`, if any; return its true global norm before: 0-d float32."""
        ...

    def step(self, lr: float) -> None:
        """Update the weights with learning rate `lr` and drop the gradient."""
        ...

    def skip_step(self) -> None:
        """Drop the gradient without an update; for the experts the step is over all the same."""
        ...

    def evaluate(self, batch: Batch) -> Tensor:
        """Sum of the losses over this rank's counted targets: 0-d float32, no gradient."""
        ...

    def next_logits(self, tokens: Tensor) -> Tensor:
        """Logits of the token after `tokens`, int64 [T]: [V] on every rank, no gradient."""
        ...

    def weight_shards(self) -> list[WeightShard]:
        """Where every weight lives, with its gradient and moments."""
        ...

    def describe(self) -> str:
        """One line for people: layout, precision, device."""
        ...
