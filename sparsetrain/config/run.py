"""The whole config: one `RunConfig` is one run."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from sparsetrain.config.base import Section, kind_from_text
from sparsetrain.config.data import DataConfig
from sparsetrain.config.model import ModelConfig
from sparsetrain.config.sparsity import Fraction, SparsityRule
from sparsetrain.config.units import Count


class LearningRateSchedule(Section):
    """The learning rate over a phase; `warmup` and `decay` are fractions of the phase's tokens."""

    kind: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """After a linear warmup: half a cosine, a straight line, a plateau followed by a linear decay, or no change."""
    warmup: Fraction = 0.02
    final: Fraction = 0.1
    """Last learning rate as a fraction of the peak; unused by constant."""
    decay: Fraction = 0.2
    """Length of the decay at the end of wsd."""

    @model_validator(mode="after")
    def _room_for_both(self) -> Self:
        if self.kind == "wsd" and self.warmup + self.decay > 1:
            raise ValueError(f"warmup={self.warmup} and decay={self.decay} overlap")
        return self


class OptimizerConfig(Section):
    """AdamW on fp32 weights; weight decay on matrices only."""

    name: Literal["adamw"] = "adamw"
    lr: float = Field(default=6e-4, gt=0)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    grad_clip: float | None = Field(default=1.0, gt=0)
    """Largest global L2 norm of the gradient; null switches clipping off."""
    schedule: Annotated[LearningRateSchedule, BeforeValidator(kind_from_text)] = LearningRateSchedule()


class BatchRamp(Section):
    """Grow the batch in equal increments from a small one."""

    start_tokens: Count = Field(gt=0)
    """First global batch, in tokens; also the increment."""
    over: Fraction = 0.1
    """Fraction of the phase's tokens over which the batch grows to train.batch_tokens."""


class PhaseConfig(Section):
    """A later phase of a run; sections that it leaves out, or leaves out parts of, are those of the run."""

    name: str = Field(min_length=1)
    tokens: Count = Field(gt=0)
    sparsity: Literal["keep"] | tuple[SparsityRule, ...] = "keep"
    """keep: the masks stay as the phase before left them. []: dense, zeroed weights start at 0 and learn."""
    data: DataConfig
    optimizer: OptimizerConfig
    optimizer_state: Literal["reset", "keep"] = "reset"
    """What becomes of Adam's moments and step count; the learning-rate schedule always starts anew."""


class TrainConfig(Section):
    """How long, in which batches and precision."""

    tokens: Count = Field(gt=0)
    """Tokens of the first phase, rounded up to whole steps."""
    batch_tokens: Count = Field(gt=0)
    """Global batch in tokens, a multiple of data.seq_len; the same at every number of ranks."""
    micro_batch_size: int = Field(default=8, gt=0)
    """Samples a rank runs through the model at once; smaller needs less memory."""
    batch_ramp: BatchRamp | None = None
    precision: Literal["bf16", "fp32"] = "fp32"
    """bf16: autocast with fp32 weights."""
    compile: bool = False
    """torch.compile the model: faster steps, after a minute or more of compilation."""
    activation_checkpointing: bool = False
    """Recompute each layer's activations in the backward pass: less memory, about a third more compute."""
    eval_every_steps: int = Field(default=50, gt=0)
    eval_tokens: Count = Field(default=64 * 1024, gt=0)
    """Held-out tokens an evaluation reads, at most."""
    max_bad_steps: int = Field(default=10, ge=0)
    """Steps with a NaN or infinite loss or gradient that may be skipped before the run stops."""
    init_from: str | None = None
    """Run folder or checkpoint whose weights to start from."""
    phase_name: str = "pretrain"
    phases: tuple[PhaseConfig, ...] = ()
    """What comes after the first phase."""


class ParallelConfig(Section):
    """How the model is laid over ranks."""

    engine: Literal["torch"] = "torch"
    shard: Literal["ddp", "full"] = "ddp"
    """ddp: every rank holds everything. full: weights, gradients and optimizer state sharded (fully_shard)."""
    shard_size: int | None = Field(default=None, gt=0)
    """With shard=full: ranks that share one copy of the weights, the rest replicate; default all ranks."""
    tp: Literal[1] = 1
    pp: Literal[1] = 1
    cp: Literal[1] = 1


class ClusterConfig(Section):
    """What is asked of Ray."""

    workers: int = Field(default=1, gt=0)
    cpus_per_worker: float = Field(default=1, gt=0)
    gpus_per_worker: float = Field(default=0, ge=0)
    address: str = "local"
    """local: start Ray on this machine. Or the address of a cluster, or auto."""
    max_restarts: int = Field(default=3, ge=0)
    """How often a failed group of workers is restarted from the last checkpoint."""
    collective_timeout_s: float = Field(default=600, gt=0)
    """How long a rank waits for the others in one collective."""
    start_timeout_s: float = Field(default=120, gt=0)
    """How long to wait for the cluster to have the resources asked for."""


class CheckpointConfig(Section):
    """When to save, and how much to keep."""

    every_steps: int = Field(default=50, gt=0)
    keep: int = Field(default=2, gt=0)
    """Checkpoints kept; older ones are deleted once a newer one is complete."""


class RunConfig(Section):
    """Everything about a run."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9._-]+$")
    seed: int = Field(default=0, ge=0)
    model: ModelConfig
    sparsity: tuple[SparsityRule, ...] = ()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig
    parallel: ParallelConfig = ParallelConfig()
    cluster: ClusterConfig = ClusterConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    output: str = Field(default="", validate_default=False)
    """Run folder; default runs/<name>."""

    @model_validator(mode="before")
    @classmethod
    def _complete_phases(cls, raw: Any) -> Any:
        """Fill each phase's `data` and `optimizer` from the run's, so that a phase says only what differs."""
        if not isinstance(raw, dict) or not isinstance(raw.get("train"), dict):
            return raw
        phases = raw["train"].get("phases")
        if not isinstance(phases, list | tuple) or not all(isinstance(phase, dict) for phase in phases):
            return raw
        completed = [
            {**phase, **{key: _merge(raw.get(key) or {}, phase.get(key) or {}) for key in ("data", "optimizer")}}
            for phase in phases
        ]
        return {**raw, "train": {**raw["train"], "phases": completed}}

    @model_validator(mode="before")
    @classmethod
    def _default_output(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and isinstance(raw.get("name"), str) and not raw.get("output"):
            return {**raw, "output": f"runs/{raw['name']}"}
        return raw

    @field_validator("output")
    @classmethod
    def _named(cls, output: str) -> str:
        if not output.strip():
            raise ValueError("expected a folder")
        return output

    @property
    def phases(self) -> tuple[PhaseConfig, ...]:
        """All phases in order, the first one included."""
        first = PhaseConfig(
            name=self.train.phase_name,
            tokens=self.train.tokens,
            sparsity=self.sparsity,
            data=self.data,
            optimizer=self.optimizer,
        )
        return (first, *self.train.phases)


def _merge(base: Any, override: Any) -> Any:
    """Deep merge of plain mappings; a section that changes its `kind` starts from nothing."""
    if not isinstance(base, dict) or not isinstance(override, dict):
        return override
    if "kind" in override and override.get("kind") != base.get("kind"):
        return override
    return {**base, **{key: _merge(base.get(key), value) if key in base else value for key, value in override.items()}}
