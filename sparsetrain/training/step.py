"""One optimizer step, from samples to updated weights."""

import math
from dataclasses import dataclass, replace

from sparsetrain.config import TrainConfig
from sparsetrain.data import Batch, Dataset
from sparsetrain.engines import Engine
from sparsetrain.errors import TrainingError
from sparsetrain.parallel import MoEReport, World
from sparsetrain.sparsity import Sparsifier
from sparsetrain.training.lr_schedule import learning_rate
from sparsetrain.training.phase_plan import PhasePlan
from sparsetrain.training.state import RunState

SAMPLES_SHOWN = 16
"""Samples that are named when bad ones stop a run."""


@dataclass(frozen=True)
class StepResult:
    """What one step came to; the same on all ranks."""

    loss: float
    """Mean over the global batch, nats a token."""
    grad_norm: float
    """True global L2 norm of the gradient before clipping, zeroed weights left out."""
    lr: float
    num_tokens: int
    first_sample: int
    """Index in the phase's order of samples at which the batch begins."""
    num_samples: int
    aux_loss: float | None = None
    """What balance and router losses add to the loss; None without experts."""
    experts: MoEReport | None = None
    """What the experts had to do; None without any."""

    @property
    def is_finite(self) -> bool:
        """Whether the step could be taken."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def train_step(
    engine: Engine,
    sparsifier: Sparsifier,
    dataset: Dataset,
    plan: PhasePlan,
    train: TrainConfig,
    state: RunState,
    world: World,
) -> StepResult:
    """Train on the step's batch and move `state` on; the weights stay if its loss or gradient is not finite.

    Raises:
        TrainingError: More than train.max_bad_steps such steps.
    """
    first, count = plan.first_sample(state.phase_step), plan.samples_in_step(state.phase_step)
    num_tokens = count * plan.seq_len
    optimizer = plan.phase.optimizer
    lr = learning_rate(optimizer, first * plan.seq_len + num_tokens, plan.num_tokens)

    loss = engine.forward_backward(micro_batches(dataset, first, count, train.micro_batch_size, world))
    sparsifier.mask_gradients()  # before the norm, which is that of the weights that are there
    grad_norm = engine.clip(optimizer.grad_clip)
    aux_loss = None if engine.aux_loss is None else engine.aux_loss.item()
    result = StepResult(loss.item(), grad_norm.item(), lr, num_tokens, first, count, aux_loss)
    if result.is_finite:
        engine.step(lr)
    else:
        engine.skip_step()
        sparsifier.after_step()  # schedules go by steps, taken or not
        state.bad_steps += 1
        _stop_beyond_limit(result, dataset, plan, train, state)
    state.step += 1
    state.phase_step += 1
    if engine.experts is not None:
        result = replace(result, experts=engine.experts.report)
    return result


def micro_batches(dataset: Dataset, first: int, count: int, micro_batch_size: int, world: World) -> list[Batch]:
    """This rank's share of the global batch [first, first + count): consecutive samples, cut into micro-batches."""
    share = count // world.num_shares
    start = first + world.share * share
    stop = start + share
    return [dataset.batch(at, min(micro_batch_size, stop - at)) for at in range(start, stop, micro_batch_size)]


def _stop_beyond_limit(
    result: StepResult, dataset: Dataset, plan: PhasePlan, train: TrainConfig, state: RunState
) -> None:
    if state.bad_steps <= train.max_bad_steps:
        return
    shown = dataset.batch(result.first_sample, min(result.num_samples, SAMPLES_SHOWN)).sample_ids.tolist()
    more = f" and {result.num_samples - len(shown)} more" if result.num_samples > len(shown) else ""
    raise TrainingError(
        f"loss {result.loss:g} and gradient norm {result.grad_norm:g} at step {state.step + 1}: {state.bad_steps} "
        f"steps had to be skipped, more than train.max_bad_steps={train.max_bad_steps}. Lower "
        f"optimizer.lr={plan.phase.optimizer.lr:g} or optimizer.grad_clip, or lengthen optimizer.schedule.warmup; if "
        f"neither helps, look at the text: the batch was samples {', '.join(map(str, shown))}{more} of the corpus of "
        f"phase {plan.phase.name}, each of {plan.seq_len} tokens"
    )
