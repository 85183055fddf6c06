"""Megatron-Core: matrices cut over tensor-parallel ranks, layers over stages, samples over context-parallel ranks.

Megatron's schedules run the model, its layers exchange activations and its DistributedDataParallel adds up gradients.
Clipping by the true norm, the masks and AdamW are ours, and see weights through their shards as on every engine.
"""

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import mpu, tensor_parallel
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.optim import Optimizer

from sparsetrain.config import OptimizerConfig, RunConfig
from sparsetrain.data import Batch
from sparsetrain.engines.megatron_model import MegatronModel, Shape
from sparsetrain.engines.megatron_rows import RowPartition
from sparsetrain.engines.megatron_schedule import Finish, Inputs, Stage, replicated, run_schedule
from sparsetrain.engines.optimizer import adamw, optimizer_groups
from sparsetrain.engines.sharded_update import ShardedUpdateEngine
from sparsetrain.models import initialize_
from sparsetrain.moe import auxiliary_loss, moe_layers
from sparsetrain.moe.routers.replay import ReplayRouter
from sparsetrain.parallel import World, set_gradient_sync, store_parameters
from sparsetrain.sharding import weight_shards


class MegatronEngine(ShardedUpdateEngine):
    """A transformer on Megatron-Core; arguments are those of TorchEngine.

    A rank holds its part of the model only, from the beginning.
    """

    _module: MegatronModel
    _rows: RowPartition | None = None
    """With zero=1, the rows of weights that this rank updates."""

    def __init__(self, config: RunConfig, world: World, *, vocab_size: int, max_seq_len: int, total_steps: int) -> None:
        make_groups(config)
        super().__init__(config, world, vocab_size=vocab_size, max_seq_len=max_seq_len, total_steps=total_steps)

    def _make_module(self, config: RunConfig, vocab_size: int, max_seq_len: int) -> MegatronModel:
        shape = Shape(
            config.model,
            vocab_size,
            max_seq_len,
            sequence_parallel=config.parallel.sp,
            recompute=config.train.activation_checkpointing,
        )
        with torch.device("meta"):
            return MegatronModel(shape)

    def _prepare_experts(self, config: RunConfig) -> None:
        if config.parallel.experts is not None:
            self._module.spread_experts(config.parallel, timedelta(seconds=config.cluster.collective_timeout_s))
        for _, layer in moe_layers(self._module):
            if isinstance(layer.router, ReplayRouter):
                layer.router.source = self._world.share
            if self._layout.cp > 1 or self._layout.sp:  # ranks have parts of the samples
                add_up = partial(dist.all_reduce, group=self._group_of_samples())
                layer.loss_weights = replace(layer.loss_weights, add_up=add_up)

    def _group_of_samples(self) -> dist.ProcessGroup:
        """Ranks that have different tokens of the same samples."""
        group: dist.ProcessGroup = (
            mpu.get_tensor_and_context_parallel_group() if self._layout.sp else mpu.get_context_parallel_group()
        )
        return group

    def _group_of_tokens(self) -> dist.ProcessGroup:
        """Those of a stage that have different tokens."""
        group: dist.ProcessGroup = (
            mpu.get_tensor_and_data_parallel_group(with_context_parallel=True)
            if self._layout.sp
            else mpu.get_data_parallel_group(with_context_parallel=True)
        )
        return group

    def _group_of_stages(self) -> dist.ProcessGroup | None:
        """Ranks that hold the layers of one copy of the model, in their order; None: each holds all."""
        return mpu.get_pipeline_model_parallel_group() if self._layout.pp > 1 else None

    def _recompute_activations(self) -> None:
        """Megatron does it itself; see Shape."""

    def _lay_out(self, config: RunConfig) -> nn.Module:
        self._module.to_empty(device=self._world.device)
        initialize_(self._module, config.model, config.seed)
        self._stores = list(store_parameters(self._module).values())
        stage = Stage(self._module, self._stores, self._autocast())
        self._stage_size = self._world.size // config.parallel.pp
        self._is_last_stage = mpu.is_pipeline_last_stage()
        # Tensor-parallel ranks all come to the same loss: one of them speaks.
        self._speaks = self._is_last_stage and mpu.get_tensor_model_parallel_rank() == 0
        self._replicas = replicated(stage)
        if config.parallel.zero_stage == 1:
            self._rows = self._module.share_rows(timedelta(seconds=config.cluster.collective_timeout_s))
        return stage

    def _new_optimizer(self, config: OptimizerConfig) -> Optimizer:
        groups = optimizer_groups(self._module)
        return adamw(groups if self._rows is None else self._rows.groups(groups), config, self._world.device)

    def _find_shards(self) -> None:
        self._shards = weight_shards(self._module, self._optimizer)

    def forward_backward(self, micro_batches: Sequence[Batch]) -> Tensor:
        """Accumulate the gradient of the mean loss over the global batch, balance losses included; see Engine."""
        batches = [self._inputs(batch) for batch in micro_batches]
        num_targets = self._count_targets(micro_batches)
        totals = torch.zeros(2, device=self._world.device)  # cross entropy, what is added to it

        def finish(index: int, y: Tensor) -> Tensor:
            if self._speaks:
                totals[0] += y.detach()
            scaled = y / num_targets if self._is_last_stage else y
            if self._has_experts:
                added = self._added_loss()
                totals[1] += added.detach()
                scaled = _also_differentiate(scaled, added / num_targets)
                # Backward passes come later than the forward passes of other micro-batches.
                scaled.register_hook(  # type: ignore[no-untyped-call]
                    lambda _: set_gradient_sync(self._module, index == len(batches) - 1)
                )
            return scaled

        self._replicas.zero_grad_buffer()
        self._run_stages(batches, finish, forward_only=False)
        self._reduce_gradients()
        return self._mean_loss(totals, num_targets)

    def _inputs(self, batch: Batch) -> Inputs:
        batch = batch.to(self._world.device)
        return batch.tokens, batch.targets, batch.document_ids

    def _added_loss(self) -> Tensor:
        if not moe_layers(self._module):  # a stage may have none
            return torch.zeros((), device=self._world.device)
        return auxiliary_loss(self._module, "sum")

    @torch.no_grad()
    def _reduce_gradients(self) -> None:
        """Add up over ranks what each has of the gradient, and put it where the optimizer looks."""
        for _, parameter in self._module.replicated_parameters():
            dist.all_reduce(_sum_of_gradients(parameter), group=mpu.get_tensor_model_parallel_group())
        self._replicas.finish_grad_sync()
        for parameter in self._replicas.params_with_grad:
            parameter.grad = _sum_of_gradients(parameter)
        for parameter in self._stores:  # averaged already
            if parameter.grad is not None:
                parameter.grad *= self._stage_size
        if self._rows is not None:
            self._rows.take_gradients()

    def _run_stages(self, batches: Sequence[Inputs], finish: Finish, *, forward_only: bool) -> None:
        self._gather_if_stale()
        run_schedule(self._replicas, batches, finish, forward_only=forward_only)

    def _gather(self) -> None:
        if self._rows is not None:
            self._rows.gather()

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Tensor:
        """Sum of the losses over the counted targets of this rank's samples; the same on all ranks that read them."""
        total = torch.zeros((), device=self._world.device)

        def add(_: int, y: Tensor) -> Tensor:
            if self._speaks:
                total.add_(y)
            return y

        self._run_stages([self._inputs(batch)], add, forward_only=True)
        dist.all_reduce(total, group=mpu.get_model_parallel_group())
        dist.all_reduce(total, group=mpu.get_context_parallel_group())
        return total

    @torch.no_grad()
    def next_logits(self, tokens: Tensor) -> Tensor:
        """Logits of the token after `tokens`, int64 [T]: [V] on every rank."""
        # Ranks share the tokens evenly; none looks at what comes after it.
        ways = self._layout.cp * self._layout.tp
        padding = -len(tokens) % ways
        tokens_1T = nn.functional.pad(tokens, (0, padding)).unsqueeze(0).to(self._world.device)
        logits_V = torch.zeros(self._module.shape.vocab_size, device=self._world.device)
        holder, place = divmod(len(tokens) - 1, tokens_1T.shape[1] // self._layout.cp)

        def take(_: int, y: Tensor) -> Tensor:
            if self._is_last_stage and mpu.get_context_parallel_rank() == holder:
                logits_V.copy_(y[0, place])
            return y

        self._run_stages([(tokens_1T, None, None)], take, forward_only=True)
        for group in (mpu.get_pipeline_model_parallel_group(), mpu.get_context_parallel_group()):
            dist.all_reduce(logits_V, group=group)
        return logits_V

    def describe(self) -> str:
        """One line for people."""
        layout = self._layout
        sizes = {"tensor": layout.tp, "pipeline": layout.pp, "context": layout.cp}
        parts = [f"{name} {size}" for name, size in sizes.items() if size > 1] + ["sequence"] * layout.sp
        parts.append(f"data {self._world.num_shares}")
        shared = "" if self._rows is None else ", optimizer state shared by rows,"
        return self._describe("Megatron", " × ".join(parts) + " parallel" + shared)


def _sum_of_gradients(parameter: nn.Parameter) -> Tensor:
    """Where Megatron's DistributedDataParallel adds up a parameter's gradient: a view of a flat float32 buffer."""
    gradient: Tensor = parameter.main_grad  # type: ignore[attr-defined]
    return gradient


def _also_differentiate(y: Tensor, loss: Tensor) -> Tensor:
    """Return `y`; when the gradient comes back to it, `loss` gets 1 as its own."""
    both: Tensor = _AlsoDifferentiate.apply(y, loss)  # type: ignore[no-untyped-call]
    return both


class _AlsoDifferentiate(torch.autograd.Function):
    """What `_also_differentiate` does."""

    @staticmethod
    def forward(ctx: FunctionCtx, y: Tensor, loss: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: FunctionCtx, grad_y: Tensor) -> tuple[Tensor, Tensor]:
        return grad_y, torch.ones((), dtype=torch.float32, device=grad_y.device)


def make_groups(config: RunConfig) -> None:
    """Megatron's process groups for the run's layout, in place of those of an earlier run in this process."""
    mpu.destroy_model_parallel()
    mpu.initialize_model_parallel(
        config.parallel.tp,
        config.parallel.pp,
        context_parallel_size=config.parallel.cp,
        distributed_timeout_minutes=config.cluster.collective_timeout_s / 60,
        create_gloo_process_groups=False,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(config.seed)
