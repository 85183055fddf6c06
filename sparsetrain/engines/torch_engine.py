"""Plain torch: DDP or fully_shard, bf16 autocast over fp32 weights, AdamW."""

import contextlib
from collections.abc import Iterator, Sequence
from datetime import timedelta

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from sparsetrain.config import OptimizerConfig, RunConfig
from sparsetrain.data import NOT_COUNTED, Batch
from sparsetrain.engines.allocator import keep_freed_memory
from sparsetrain.engines.optimizer import build_optimizer
from sparsetrain.models import Transformer, initialize_, use_sparse_linears
from sparsetrain.moe import auxiliary_loss, moe_layers
from sparsetrain.moe.routers.replay import ReplayRouter
from sparsetrain.parallel import MoEController, World, parallelize_data, set_gradient_sync, spread_experts
from sparsetrain.sharding import WeightShard, clip_grads_, global_grad_norm, on_move, reshard, weight_shards


class TorchEngine:
    """A transformer on torch's own data parallelism.

    Args:
        config: Model, precision, layout and the first phase's optimizer.
        world: The ranks.
        vocab_size: Rows of the embedding.
        max_seq_len: Longest sample of any phase, in tokens.
        total_steps: Optimizer steps of all phases, which routers' schedules span.
    """

    def __init__(self, config: RunConfig, world: World, *, vocab_size: int, max_seq_len: int, total_steps: int) -> None:
        self._world = world
        self._total_steps = total_steps
        self._layout = config.parallel
        self._precision = config.train.precision
        if world.device.type == "cpu":
            keep_freed_memory()
        self._module = self._make_module(config, vocab_size, max_seq_len)
        self._has_experts = config.model.moe is not None
        self._aux_loss: Tensor | None = None
        self._prepare_experts(config)
        if config.train.activation_checkpointing:
            self._recompute_activations()
        self._callable = self._lay_out(config)
        if config.train.compile:
            self._callable.compile()  # in place: parameter names and hooks stay
        self._optimizer = self._new_optimizer(config.optimizer)
        self._experts = self._follow_steps() if self._has_experts else None
        self._find_shards()
        on_move(self._module, lambda _: self._find_shards())

    def _make_module(self, config: RunConfig, vocab_size: int, max_seq_len: int) -> nn.Module:
        """The bare model, or this rank's part of it, on the meta device."""
        with torch.device("meta"):
            model = Transformer(config.model, vocab_size, max_seq_len)
        use_sparse_linears(model)  # any phase may have rules
        return model

    def _prepare_experts(self, config: RunConfig) -> None:
        if config.parallel.experts is not None:
            timeout = timedelta(seconds=config.cluster.collective_timeout_s)
            spread_experts(self._module, config.parallel, self._world, timeout)
        for _, layer in moe_layers(self._module):
            if isinstance(layer.router, ReplayRouter) and self._world.size > 1:
                layer.router.source = self._world.rank

    def _follow_steps(self, earlier: MoEController | None = None) -> MoEController:
        """Have the experts looked after by one who follows the optimizer, and knows what `earlier` did."""
        if earlier is not None:
            earlier.detach()
        controller = MoEController(
            self._module,
            self._optimizer,
            group=self._group_of_tokens(),
            stages=self._group_of_stages(),
            total_steps=self._total_steps,
        )
        if earlier is not None:
            controller.load_state_dict(earlier.state_dict())
        return controller

    def _recompute_activations(self) -> None:
        for index, layer in enumerate(self._layers):
            self._layers[index] = checkpoint_wrapper(layer)

    @property
    def _layers(self) -> nn.ModuleList:
        layers: nn.ModuleList = self._module.get_submodule("layers")  # type: ignore[assignment]
        return layers

    def _group_of_tokens(self) -> ProcessGroup | None:
        """Ranks that hold the same layers and different tokens; None: all."""
        return None

    def _group_of_stages(self) -> ProcessGroup | None:
        """Ranks that hold the layers of one copy of the model, in their order; None: each holds all."""
        return None

    def _lay_out(self, config: RunConfig) -> nn.Module:
        """Give the weights their first values, and spread the model over the ranks; returns the module to call."""
        if config.parallel.shard == "full":
            module = self._parallelize(config)
            self._materialize(config)
            return module
        self._materialize(config)
        return self._parallelize(config)

    def _parallelize(self, config: RunConfig) -> nn.Module:
        return parallelize_data(self._module, self._layers, config.parallel, self._world)

    def _materialize(self, config: RunConfig) -> None:
        self._module.to_empty(device=self._world.device)
        initialize_(self._module, config.model, config.seed)

    def _new_optimizer(self, config: OptimizerConfig) -> Optimizer:
        return build_optimizer(self._module, config, self._world.device)

    def _find_shards(self) -> None:
        self._shards = weight_shards(self._callable, self._optimizer)

    @property
    def module(self) -> nn.Module:
        """The bare model; see Engine."""
        return self._module

    @property
    def optimizer(self) -> Optimizer:
        """AdamW over the parameters that this rank holds."""
        return self._optimizer

    @property
    def experts(self) -> MoEController | None:
        """Looks after the experts between steps; see Engine."""
        return self._experts

    @property
    def aux_loss(self) -> Tensor | None:
        """What balance and router losses added; see Engine."""
        return self._aux_loss

    def use_optimizer(self, config: OptimizerConfig, *, keep_state: bool) -> None:
        """Begin a phase: new hyperparameters, and Adam's moments and step count kept or forgotten."""
        state = self._optimizer.state
        reshard(self._module)  # the optimizer is built on the sharded parameters
        self._optimizer = self._new_optimizer(config)
        if keep_state:
            self._optimizer.state = state
        if self._experts is not None:
            self._experts = self._follow_steps(self._experts)
        self._find_shards()

    def forward_backward(self, micro_batches: Sequence[Batch]) -> Tensor:
        """Accumulate the gradient of the mean loss over the global batch, balance losses included; see Engine."""
        num_targets = self._count_targets(micro_batches)
        # Data parallelism averages over ranks; the mean over targets wants their sum.
        scale = self._world.size / num_targets
        totals = torch.zeros(2, device=self._world.device)  # cross entropy, what is added to it
        for index, batch in enumerate(micro_batches):
            with self._synchronizing(index == len(micro_batches) - 1):
                loss = self._loss(batch)
                totals[0] += loss.detach()
                if self._has_experts:
                    added = auxiliary_loss(self._module, "sum")
                    totals[1] += added.detach()
                    loss = loss + added
                self._backward(loss * scale)
        return self._mean_loss(totals, num_targets)

    def _count_targets(self, micro_batches: Sequence[Batch]) -> Tensor:
        """How many targets of the global batch are counted: 0-d int64, the same on all ranks."""
        counts = torch.stack([(batch.targets != NOT_COUNTED).sum() for batch in micro_batches])
        return self._world.sum_(counts.sum().to(self._world.device)) // self._layout.model_ranks

    def _mean_loss(self, totals: Tensor, num_targets: Tensor) -> Tensor:
        """The mean cross entropy of the global batch, and beside it `aux_loss`, from a rank's sums of both."""
        means = self._world.sum_(totals) / num_targets
        self._aux_loss = means[1] if self._has_experts else None
        return means[0]

    def clip(self, max_norm: float | None) -> Tensor:
        """Clip by the true global norm and return it; see Engine."""
        norm = global_grad_norm(self._shards)
        if max_norm is not None:
            clip_grads_(self._shards, max_norm, norm)
        return norm

    def step(self, lr: float) -> None:
        """Update the weights and drop the gradient."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad()

    def skip_step(self) -> None:
        """Drop the gradient without an update; see Engine."""
        self._optimizer.zero_grad()
        if self._experts is not None:
            self._experts.after_step()

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Tensor:
        """Sum of the losses over this rank's counted targets."""
        return self._loss(batch)

    @torch.no_grad()
    def next_logits(self, tokens: Tensor) -> Tensor:
        """Logits of the token after `tokens`, int64 [T]: [V] on every rank."""
        # Every length would be compiled anew.
        with torch.compiler.set_stance("force_eager"):
            logits_1TV = self._run_model(tokens.unsqueeze(0).to(self._world.device))
        return logits_1TV[0, -1]

    def weight_shards(self) -> list[WeightShard]:
        """Where every weight lives, with its gradient and moments."""
        return self._shards

    def describe(self) -> str:
        """One line for people."""
        return self._describe("torch", {"ddp": "replicated", "full": "fully sharded"}[self._layout.shard])

    def _describe(self, library: str, layout: str) -> str:
        ranks = f"{self._world.size} rank{'s' if self._world.size > 1 else ''}"
        experts = self._layout.experts
        if experts is not None:
            spread = {"ep": "expert parallelism", "fssdp": "FSSDP"}[experts]
            layout = f"{layout}, experts by {spread} over {self._layout.ep or self._world.size},"
        return f"{library}, {layout} over {ranks}, {self._precision}, {self._world.device.type}"

    def _backward(self, loss: Tensor) -> None:
        torch.autograd.backward(loss)

    def _loss(self, batch: Batch) -> Tensor:
        batch = batch.to(self._world.device)
        return self._run_model(batch.tokens, batch.targets, batch.document_ids)

    def _run_model(self, *inputs: Tensor) -> Tensor:
        with self._autocast():
            y: Tensor = self._callable(*inputs)
        return y

    def _autocast(self) -> contextlib.AbstractContextManager[None]:
        return torch.autocast(self._world.device.type, torch.bfloat16, enabled=self._precision == "bf16")

    @contextlib.contextmanager
    def _synchronizing(self, is_last: bool) -> Iterator[None]:
        """Reduce gradients over ranks in the last micro-batch only; the others add up locally."""
        if self._has_experts:
            set_gradient_sync(self._module, is_last)
        if isinstance(self._callable, FSDPModule):
            self._callable.set_requires_gradient_sync(is_last)
            yield
        elif isinstance(self._callable, DistributedDataParallel) and not is_last:
            with self._callable.no_sync():
                yield
        else:
            yield
