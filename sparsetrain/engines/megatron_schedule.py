"""Micro-batches through Megatron's schedules: one after the other, or with pp > 1 as a pipeline."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from itertools import groupby

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from sparsetrain.engines.megatron_model import MegatronModel
from sparsetrain.engines.shown_model import ShownModel

Inputs = tuple[Tensor, Tensor | None, Tensor | None]
"""Tokens, targets and document ids of a micro-batch, each [B, T]; without targets the model answers with logits."""

Finish = Callable[[int, Tensor], Tensor]
"""From the number of a micro-batch and what the model made of it, what goes to the next stage or is differentiated."""


class Stage(ShownModel):
    """The model of this pipeline rank as Megatron's schedules and its DistributedDataParallel want to see it.

    Arguments are those of ShownModel.
    """

    def __init__(
        self, model: MegatronModel, kept_apart: Iterable[nn.Parameter], autocast: AbstractContextManager[None]
    ) -> None:
        super().__init__(model, kept_apart, autocast)
        self._gpt = (model.gpt,)  # not a submodule: its parameters are those of `model`
        self.config, self.model_type = model.gpt.config, model.gpt.model_type

    def set_input_tensor(self, activations: Tensor | list[Tensor | None] | None) -> None:
        """Take what the previous stage has sent."""
        self._gpt[0].set_input_tensor(activations)


def replicated(stage: Stage) -> DistributedDataParallel:
    """Megatron's data parallelism around a stage: it adds up gradients in float32 over the copies of the model."""
    stage.config.calculate_per_token_loss = True  # sums, not means over micro-batches: tokens are counted by the engine
    return DistributedDataParallel(stage.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), stage)


def run_schedule(
    model: DistributedDataParallel, batches: Sequence[Inputs], finish: Finish, *, forward_only: bool
) -> None:
    """Run micro-batches through all stages, and unless `forward_only` back again; collective over a model's ranks.

    Args:
        model: From `replicated`.
        batches: The same on all ranks of a copy of the model; on their device.
        finish: Called on every stage after each forward pass.
        forward_only: Whether no gradient is wanted.
    """
    # A pipeline's messages are all of one size, and the last micro-batch of a share may be smaller.
    for (samples, tokens), group in groupby(enumerate(batches), key=lambda item: tuple(item[1][0].shape)):
        same = list(group)
        get_forward_backward_func()(
            forward_step_func=lambda coming, stage: _forward(stage, next(coming), finish),
            data_iterator=iter(same),
            model=[model],
            num_microbatches=len(same),
            seq_length=tokens,
            micro_batch_size=samples,
            forward_only=forward_only,
        )


def _forward(
    model: nn.Module, numbered: tuple[int, Inputs], finish: Finish
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, None]]]:
    index, inputs = numbered
    y = finish(index, model(*inputs))
    # Megatron calls what is second on the last stage alone; it wants to count tokens, which the engine does itself.
    return y, lambda loss: (loss, torch.zeros((), dtype=torch.int, device=loss.device), None)
