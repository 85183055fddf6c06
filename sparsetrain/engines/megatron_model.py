"""Our model as Megatron-Core's `GPTModel`: the part of it that a rank holds, under the names of the plain model."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor, nn

from sparsetrain.config import ParallelConfig
from sparsetrain.config.model import ModelConfig
from sparsetrain.engines.megatron_layers import Block, Mixture, layer_spec, norm_class
from sparsetrain.engines.megatron_rows import RowPartition
from sparsetrain.engines.megatron_weights import SpreadExperts, StageWeights
from sparsetrain.models import Transformer, use_sparse_linears
from sparsetrain.models.loss import IGNORED
from sparsetrain.moe import moe_layers
from sparsetrain.parallel.fssdp.groups import ExpertGroups
from sparsetrain.parallel.fssdp.store import store_parameters
from sparsetrain.parallel.parallelize import parallelize_experts
from sparsetrain.planning.tensor_parallel import cut_dim
from sparsetrain.sharding import MomentsOf, WeightShard, weight_shapes


@dataclass(frozen=True)
class Shape:
    """What a model is built from."""

    model: ModelConfig
    vocab_size: int
    """Rows of the embedding; a multiple of the tensor-parallel ranks."""
    max_seq_len: int
    """Tokens of the longest sample; a multiple of the context-parallel ranks."""
    sequence_parallel: bool = False
    """Tensor-parallel ranks cut sequences between the matrices."""
    recompute: bool = False
    """Keep only the inputs of layers for the backward pass."""


def megatron_config(shape: Shape) -> TransformerConfig:
    """Megatron's config of a model, at the layout that `initialize_model_parallel` was told."""
    model = shape.model
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.dim,
        num_attention_heads=model.num_heads,
        num_query_groups=model.kv_heads,
        ffn_hidden_size=model.hidden_dim,
        layernorm_epsilon=model.norm_eps,
        add_bias_linear=model.arch == "gpt2",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=mpu.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=mpu.get_pipeline_model_parallel_world_size(),
        context_parallel_size=mpu.get_context_parallel_world_size(),
        sequence_parallel=shape.sequence_parallel,
        pipeline_dtype=torch.float32,  # the residual stream's, under autocast too
        calculate_per_token_loss=True,  # what a schedule is given it does not scale
        # Weights are made on the meta device, and filled by us.
        use_cpu_initialization=True,
        perform_initialization=False,
        # The rest are kernels that need apex, or Transformer Engine, or nvcc.
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
    )


class MegatronModel(nn.Module):
    """One pipeline stage of a `Transformer`, cut over the tensor-parallel ranks of the stage.

    Its submodules are those of the `GPTModel`, under the names of the plain model, with the numbers that layers have in
    the whole. It describes the weights of the whole model; those of other stages are empty here. As in the plain model
    the constructor leaves the weights without values: make it on the meta device, `to_empty`, and `initialize_`.

    Args:
        shape: Of the model. Megatron's `initialize_model_parallel` must have been called.
    """

    embed: nn.Module | None
    positions: nn.Module | None
    norm: nn.Module | None
    head: nn.Module | None

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape, self.config = shape, shape.model
        self._groups = ProcessGroupCollection.use_mpu_process_groups()
        gpt = _gpt_model(shape, self._groups)
        self._gpt = (gpt,)  # not a submodule: its names are others
        first, is_tied = get_transformer_layer_offset(gpt.config), shape.model.ties_embeddings
        self.embed = gpt.embedding.word_embeddings if gpt.pre_process else None
        self.positions = gpt.embedding.position_embeddings if gpt.pre_process and _is_gpt2(shape) else None
        self.layers = nn.ModuleDict({str(first + at): _parts(block) for at, block in enumerate(gpt.decoder.layers)})
        self.norm = gpt.decoder.final_layernorm
        self.head = gpt.output_layer if gpt.post_process and not is_tied else None
        with torch.device("meta"):
            self._whole = (Transformer(shape.model, shape.vocab_size, shape.max_seq_len),)
        shapes = weight_shapes(self.whole)
        use_sparse_linears(self.whole, [name for name in shapes if _is_sparse_linear(name)])
        self._weights = StageWeights(shapes, self._groups)

    @property
    def whole(self) -> Transformer:
        """The plain model, on the meta device; see PartOfModel."""
        return self._whole[0]

    @property
    def gpt(self) -> GPTModel:
        """Megatron's model, for its schedules."""
        return self._gpt[0]

    def forward(
        self, tokens_BT: Tensor, targets_BT: Tensor | None = None, document_ids_BT: Tensor | None = None
    ) -> Tensor:
        """As `Transformer.forward`, for the stage and the tokens of this rank.

        Args:
            tokens_BT: int64 token ids of whole samples; context-parallel ranks take their stretch of them.
            targets_BT: int64 ids of the next tokens, -100 where a token is not counted.
            document_ids_BT: Which packed document a token belongs to.

        Returns:
            On the last stage, with targets, the sum of the cross entropies of this rank's counted tokens (0-d float32,
            in nats, alike on tensor-parallel ranks); without, their logits [B, T, V]. On the others the activations
            [T, B, M] for the next stage.
        """
        here = self._stretch(tokens_BT.shape[1])
        positions_1T = torch.arange(here.start, here.stop, device=tokens_BT.device).unsqueeze(0)
        visible = document_ids_BT if self.config.attention.within_documents else None
        targets = None if targets_BT is None else targets_BT[:, here].contiguous()
        y: Tensor = self.gpt(
            tokens_BT[:, here], positions_1T, visible, labels=targets, runtime_gather_output=targets is None
        )
        if not self.gpt.post_process or targets is None:
            return y
        return torch.where(targets == IGNORED, 0.0, y).sum()

    def multiplied_part(self, name: str, whole: Tensor) -> Tensor:
        """The part of a weight that tensor parallelism gives this rank; see PartOfModel."""
        dim = cut_dim(name)
        if dim is None:
            return whole
        size = whole.shape[dim] // self._groups.tp.size()
        return whole.narrow(dim, size * self._groups.tp.rank(), size)

    def describe_weights(self, path: str) -> dict[str, tuple[int, ...]]:
        """Whole shape of every weight of the whole model; see DescribesWeights."""
        return self._weights.describe(path)

    def shards_of_weights(self, path: str, moments: MomentsOf, replica_rank: int) -> list[WeightShard]:
        """What this rank holds of them; see DescribesWeights. Which copy it has, the model knows itself."""
        return self._weights.shards(self, path, moments)

    def spread_experts(self, parallel: ParallelConfig, timeout: timedelta) -> None:
        """Replace the experts by ones spread over groups of consecutive ranks of a stage; collective over all ranks.

        Gradients of experts come out averaged over the ranks of a stage, tensor-parallel ones among them.

        Args:
            parallel: ep or fssdp, over how many ranks (default: all of a stage), with which options.
            timeout: How long a collective waits for a rank that does not come.
        """
        assert parallel.experts is not None
        num_stages = self._groups.pp.size()
        stage_size = dist.get_world_size() // num_stages
        size, first = parallel.ep or stage_size, stage_size * self._groups.pp.rank()
        rows = [list(range(row, row + size)) for row in range(first, first + stage_size, size)]
        places = range(0, stage_size, size)
        columns = [
            [stage + row + rank for stage in range(0, stage_size * num_stages, stage_size) for rank in range(size)]
            for row in places
        ]
        across, _ = dist.new_subgroups_by_enumeration(columns, timeout=timeout)  # type: ignore[no-untyped-call]
        groups = ExpertGroups.of_rows(rows, timeout=timeout)
        self._weights.spread(SpreadExperts(across, groups.replica_rank))
        if moe_layers(self):  # a stage may have none
            parallelize_experts(self, groups, parallel.experts, parallel.fssdp)

    def share_rows(self, timeout: timedelta) -> RowPartition:
        """Have each rank look after some rows only of the weights that others hold, too; collective over all ranks.

        From now on shards are of these rows. Call it when weights have their first values.

        Args:
            timeout: How long a collective waits for a rank that does not come.
        """
        return self._weights.share_rows(self, timeout)

    def replicated_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters, by name, that tensor-parallel ranks all hold whole, and use for their own tokens only.

        There are some with sequence parallelism: add up their gradients over the tensor-parallel ranks.
        """
        if not self.shape.sequence_parallel:
            return
        spread = set(store_parameters(self).values())
        for name, parameter in self.named_parameters():
            # Positions are added before sequences are cut.
            if cut_dim(name) is None and name != "positions.weight" and parameter not in spread:
                yield name, parameter

    def _stretch(self, num_tokens: int) -> slice:
        size, rank = self._groups.cp.size(), self._groups.cp.rank()
        if num_tokens % size:
            raise ValueError(f"{num_tokens} tokens cannot be cut evenly over {size} context-parallel ranks")
        return slice(num_tokens // size * rank, num_tokens // size * (rank + 1))


def _gpt_model(shape: Shape, groups: ProcessGroupCollection) -> GPTModel:
    config = megatron_config(shape)
    first = get_transformer_layer_offset(config)
    count = config.num_layers // config.pipeline_model_parallel_size
    specs = [layer_spec(shape.model, first + at, recompute=shape.recompute) for at in range(count)]
    return GPTModel(
        config,
        TransformerBlockSubmodules(layer_specs=specs, layer_norm=norm_class(shape.model)),
        shape.vocab_size,
        shape.max_seq_len,
        pre_process=groups.pp.rank() == 0,
        post_process=groups.pp.rank() == groups.pp.size() - 1,
        share_embeddings_and_output_weights=shape.model.ties_embeddings,
        position_embedding_type="learned_absolute" if _is_gpt2(shape) else "none",  # attention rotates by itself
        pg_collection=groups,
    )


def _is_sparse_linear(name: str) -> bool:
    """Whether a weight is that of a linear layer which leaves out zeros: those inside the layers that are cut."""
    return name.startswith("layers.") and name.endswith(".weight") and cut_dim(name) is not None


def _is_gpt2(shape: Shape) -> bool:
    return shape.model.arch == "gpt2"


def _parts(block: Block) -> nn.ModuleDict:
    """A layer under the names of the plain model."""
    feed_forward = {"moe": block.mlp.moe} if isinstance(block.mlp, Mixture) else {"ffn": block.mlp}
    norms = {"attention_norm": block.input_layernorm, "ffn_norm": block.pre_mlp_layernorm}
    return nn.ModuleDict(norms | {"attention": block.self_attention} | feed_forward)
