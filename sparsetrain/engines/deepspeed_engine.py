"""DeepSpeed: ZeRO 0 to 3 lays weights, gradients and optimizer state over ranks; the optimizer and masks are ours.

DeepSpeed averages gradients, partitions them and gathers weights. Clipping by the true norm, the masks and AdamW work
on its flat partitions (`zero_partitions`), so a step computes what it does on torch's own data parallelism. Experts
that are spread over ranks never come near ZeRO: it is not shown their parameters.
"""

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from sparsetrain.config import OptimizerConfig, RunConfig
from sparsetrain.data import Batch
from sparsetrain.engines.deepspeed_config import deepspeed_config, offloads_optimizer, require_deepspeed
from sparsetrain.engines.optimizer import OptimizerGroup, adamw, optimizer_groups
from sparsetrain.engines.sharded_update import ShardedUpdateEngine
from sparsetrain.engines.shown_model import ShownModel
from sparsetrain.engines.zero_partitions import ZeroPartitions, moments_reader, weights_in_parameters
from sparsetrain.errors import ConfigError
from sparsetrain.moe import moe_layers
from sparsetrain.parallel import set_gradient_sync, store_parameters
from sparsetrain.sharding import DescribesWeights, WeightShard, weight_modules, weight_shards


class DeepSpeedEngine(ShardedUpdateEngine):
    """A transformer on DeepSpeed's ZeRO; arguments are those of TorchEngine.

    Every rank holds the whole model for a moment while it is made, at every stage.

    Raises:
        ConfigError: DeepSpeed is not installed, or engine_overrides.deepspeed contradicts the run.
    """

    _partitions: ZeroPartitions | None = None
    """None at stage 0, where weights are whole."""

    def _lay_out(self, config: RunConfig) -> nn.Module:
        require_deepspeed(config)
        self._optimizer_device = torch.device("cpu") if offloads_optimizer(config) else self._world.device
        self._materialize(config)
        self._groups = optimizer_groups(self._module)
        stores = list(store_parameters(self._module).values())
        kept_apart = {id(parameter) for parameter in stores}
        weights = weights_in_parameters(self._module)
        ours = [group for group in self._groups if not any(id(p) in kept_apart for p in group.parameters)]
        # A stand-in: it holds no state, and DeepSpeed never steps it.
        stand_in = SGD([{"params": list(group.parameters)} for group in ours], lr=0.0)
        deepspeed = import_deepspeed(self._world.device)
        with _overrides_blamed():
            self._library, *_ = deepspeed.initialize(
                model=ShownModel(self._module, stores, super()._autocast()),
                optimizer=stand_in,
                config=deepspeed_config(config),
                dist_init_required=False,
            )
        stage = config.parallel.zero_stage
        if stage == 3:
            # It gathers a module's weights for the backward pass when it sees the gradient of what the module returned;
            # a router returns no tensor, but its layer does.
            for _, layer in moe_layers(self._module):
                for parameter in layer.router.parameters():
                    deepspeed.zero.register_external_parameter(layer, parameter)
        if stage > 0:
            self._partitions = ZeroPartitions(self._library.optimizer, stage, weights, self._group_of_partitions())
            flat = {id(group): self._partitions.of_group(at) for at, group in enumerate(ours)}
            self._groups = [
                OptimizerGroup(flat.get(id(group), group.parameters), group.is_decayed) for group in self._groups
            ]
        module: nn.Module = self._library
        return module

    def _group_of_partitions(self) -> dist.ProcessGroup:
        """The ranks that share the weights, as a group that can send from where these are optimised."""
        if self._optimizer_device == self._world.device:
            assert dist.group.WORLD is not None
            return dist.group.WORLD
        group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=self._world.timeout)
        return group

    def _new_optimizer(self, config: OptimizerConfig) -> Optimizer:
        return adamw(self._groups, config, self._optimizer_device)

    def _find_shards(self) -> None:
        rank = self._world.rank
        if self._partitions is None:
            self._shards = weight_shards(self._module, self._optimizer, replica_rank=rank)
            return
        moments = moments_reader(self._optimizer)
        cut = self._partitions.shards(moments)
        found: list[WeightShard] = []
        for path, owner, parameters in weight_modules(self._module):
            if isinstance(owner, DescribesWeights):
                names = list(owner.describe_weights(path))
                is_cut = names[0] in cut
                found += [cut[name] for name in names] if is_cut else owner.shards_of_weights(path, moments, rank)
            else:
                found += [cut[name] for name in parameters]
        self._shards = found

    def forward_backward(self, micro_batches: Sequence[Batch]) -> Tensor:
        """Leave the averaged gradient in the shards; see Engine."""
        if self._partitions is not None:
            self._partitions.expect_gradients()
        loss = super().forward_backward(micro_batches)
        if self._partitions is not None:
            self._partitions.take_gradients()
        return loss

    def describe(self) -> str:
        """One line for people."""
        is_offloaded = self._optimizer_device != self._world.device
        return self._describe("DeepSpeed", f"ZeRO-{self._layout.zero_stage}{' offloaded' if is_offloaded else ''}")

    def _run_model(self, *inputs: Tensor) -> Tensor:
        self._gather_if_stale()
        return super()._run_model(*inputs)

    def _backward(self, loss: Tensor) -> None:
        self._library.backward(loss)

    def _autocast(self) -> AbstractContextManager[None]:
        return nullcontext()  # DeepSpeed would switch one around it off: it is inside, see ShownModel

    @contextmanager
    def _synchronizing(self, is_last: bool) -> Iterator[None]:
        """Tell DeepSpeed, and the experts, whether this is the last micro-batch of the step."""
        if self._has_experts:
            set_gradient_sync(self._module, is_last)
        self._library.set_gradient_accumulation_boundary(is_last)
        yield

    def _gather(self) -> None:
        if self._partitions is not None:
            self._partitions.gather()


@contextmanager
def _overrides_blamed() -> Iterator[None]:
    """What is generated fits DeepSpeed's schema, so it is an override that does not."""
    try:
        yield
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise ConfigError(f"engine_overrides.deepspeed: DeepSpeed does not take it: {wrong}") from None


def import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, set up on the process group that is there, without a word and without compiling anything."""
    os.environ.setdefault("LOCAL_RANK", "0")
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    # It calls torch's collectives by names that torch wants replaced, and torch says so at every call.
    warnings.filterwarnings("ignore", r"`torch.distributed.\w+` is deprecated", FutureWarning)
    import deepspeed
    from deepspeed.utils import groups

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # its warnings are of what is done on purpose here
    # Collectives through shared memory are compiled when they are missing: a minute or more, and ranks of a later run
    # wait for ever on the lock file of a process that was ended meanwhile. torch's own are used instead.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # What an earlier run in this process has left belongs to a process group that is gone. The run's own group, not a
    # copy: that would wait for a lost rank as long as torch does by default.
    deepspeed.comm.comm.cdb = None
    groups._WORLD_GROUP = dist.group.WORLD
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    return deepspeed
