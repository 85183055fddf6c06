"""The whole config: one `RunConfig` is one run."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator, model_validator

from sparsetrain.config.base import Int, KeyConflict, Real, Section, kind_from_text
from sparsetrain.config.data import DataConfig, tokenizer_from_text
from sparsetrain.config.experts import FssdpConfig
from sparsetrain.config.model import ModelConfig
from sparsetrain.config.sparsity import Fraction, SparsityRule
from sparsetrain.config.units import Count, divisors_near


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
            raise KeyConflict("decay", f"warmup={self.warmup} and decay must not add up to more than 1")
        return self


class OptimizerConfig(Section):
    """AdamW on fp32 weights; weight decay on matrices only."""

    name: Literal["adamw"] = "adamw"
    lr: Real = Field(default=6e-4, gt=0)
    betas: tuple[Annotated[Real, Field(ge=0, lt=1)], Annotated[Real, Field(ge=0, lt=1)]] = (0.9, 0.95)
    eps: Real = Field(default=1e-8, gt=0)
    weight_decay: Real = Field(default=0.1, ge=0)
    grad_clip: Real | None = Field(default=1.0, gt=0)
    """Largest global L2 norm of the gradient; null switches clipping off."""
    schedule: Annotated[LearningRateSchedule, BeforeValidator(kind_from_text)] = LearningRateSchedule()


class BatchRamp(Section):
    """Grow the batch in equal increments from a small one."""

    start_tokens: Count = Field(gt=0)
    """First global batch, in tokens; also the increment."""
    over: Fraction = 0.1
    """Fraction of the phase's tokens over which the batch grows to train.batch_tokens."""


KeepOrRules = Annotated[
    Annotated[Literal["keep"], Tag("<keep>")] | Annotated[tuple[SparsityRule, ...], Tag("<rules>")],
    Discriminator(lambda value: "<keep>" if isinstance(value, str) else "<rules>"),
]
"""The discriminator makes an error speak of what was written, text or rules; `<>` keeps its tags apart from keys."""


class PhaseConfig(Section):
    """A later phase of a run; sections that it leaves out, or leaves out parts of, are those of the run."""

    name: str = Field(min_length=1)
    """What the phase is called in the display, the metrics and the plots."""
    tokens: Count = Field(gt=0)
    """Tokens of the phase, rounded up to whole steps."""
    sparsity: KeepOrRules = "keep"
    """keep: the masks stay as the phase before left them. []: dense, zeroed weights start at 0 and learn."""
    data: DataConfig
    optimizer: OptimizerConfig
    optimizer_state: Literal["reset", "keep"] = "reset"
    """What becomes of Adam's moments and step count. The learning-rate schedule always begins anew, because it spans
    the phase."""


class Upcycling(Section):
    """A dense model becomes one with experts (arXiv 2212.05055); without noise and mask they start all alike."""

    noise: Real = Field(default=0.0, ge=0)
    """Standard deviation of Gaussian noise on each expert's weights, in units of the weights' own."""
    mask: Real = Field(default=0.0, ge=0, lt=1)
    """Share of each expert's weights set to 0, other ones in each expert (EvoMoE, arXiv 2112.14397)."""


def _upcycling_from_bool(value: object) -> object:
    return {True: {}, False: None}[value] if isinstance(value, bool) else value


class TrainConfig(Section):
    """How long, in which batches and precision."""

    tokens: Count = Field(gt=0)
    """Tokens of the first phase, rounded up to whole steps."""
    batch_tokens: Count = Field(gt=0)
    """Global batch in tokens, a multiple of data.seq_len; the same at every number of ranks."""
    micro_batch_size: Int = Field(default=8, gt=0)
    """Samples a rank runs through the model at once; smaller needs less memory."""
    batch_ramp: BatchRamp | None = None
    """Of the first phase; later ones have batches of batch_tokens from their first step."""
    precision: Literal["bf16", "fp32"] = "fp32"
    """bf16: autocast with fp32 weights."""
    compile: bool = False
    """torch.compile the model: faster steps, after a minute or more of compilation."""
    activation_checkpointing: bool = False
    """Recompute each layer's activations in the backward pass: less memory, about a third more compute."""
    eval_every_steps: Int = Field(default=50, gt=0)
    eval_tokens: Count = Field(default=64 * 1024, gt=0)
    """Held-out tokens an evaluation reads, at most."""
    sample_tokens: Int = Field(default=200, ge=0)
    """Tokens that the model writes when a run is done, at most; 0: none. Each takes a forward pass."""
    max_bad_steps: Int = Field(default=10, ge=0)
    """Steps with a NaN or infinite loss or gradient that may be skipped before the run stops."""
    init_from: str | None = None
    """Run folder or checkpoint whose weights to start from."""
    upcycle: Annotated[Upcycling | None, BeforeValidator(_upcycling_from_bool)] = None
    """true, or {noise: x, mask: y}: init_from is a dense model, whose feed-forward layers every expert starts as."""
    phase_name: str = "pretrain"
    phases: tuple[PhaseConfig, ...] = ()
    """What comes after the first phase."""

    @model_validator(mode="after")
    def _upcycles_something(self) -> Self:
        if self.upcycle is not None and self.init_from is None:
            raise KeyConflict("upcycle", "needs the dense model to start from; set init_from to its run folder")
        return self

    @model_validator(mode="after")
    def _ramp_reaches_batch(self) -> Self:
        start = self.batch_ramp.start_tokens if self.batch_ramp else self.batch_tokens
        if start > self.batch_tokens:
            raise KeyConflict("batch_ramp.start_tokens", f"must be below batch_tokens={self.batch_tokens}")
        if self.batch_tokens % start:
            raise KeyConflict(
                "batch_ramp.start_tokens",
                f"must divide batch_tokens={self.batch_tokens}, because the batch grows by this much at a time; "
                f"{divisors_near(self.batch_tokens, start)}",
            )
        return self


class ParallelConfig(Section):
    """How the model is laid over ranks."""

    engine: Literal["torch", "deepspeed", "megatron"] = "torch"
    """The library that lays the model over ranks. Losses, masks and checkpoints do not depend on it."""
    zero: Annotated[Int, Field(ge=0, le=3)] | None = None
    """With engine=deepspeed, its ZeRO stage: 0 shards nothing, 1 optimizer state, 2 gradients too, 3 weights too;
    default 1. With engine=megatron, 0 or 1, as ranks that hold copies of a weight share its optimizer state; default
    0."""
    shard: Literal["ddp", "full"] = "ddp"
    """With engine=torch. ddp: every rank holds everything. full: weights, gradients and optimizer state sharded
    (fully_shard)."""
    shard_size: Int | None = Field(default=None, gt=0)
    """With shard=full: ranks that share one copy of the weights, the rest replicate; default all ranks."""
    experts: Literal["ep", "fssdp"] | None = None
    """Spread the experts of model.moe over ranks, and send tokens to them. ep: each expert on one rank (expert
    parallelism). fssdp: besides, replicas of busy experts, made anew each step. null: like any other weight."""
    ep: Int | None = Field(default=None, gt=0)
    """Ranks that share the experts, the rest replicate; default all ranks."""
    fssdp: FssdpConfig = FssdpConfig()
    """How experts are replicated and moved; of it, dispatch and pipeline are for experts=ep, too."""
    tp: Int = Field(default=1, gt=0)
    """With engine=megatron: consecutive ranks that cut every matrix between them (tensor parallelism)."""
    pp: Int = Field(default=1, gt=0)
    """With engine=megatron: stages that each hold an equal part of the layers (pipeline parallelism)."""
    cp: Int = Field(default=1, gt=0)
    """With engine=megatron: ranks that each hold a stretch of every sample (context parallelism)."""
    sp: bool = False
    """With tp > 1: between the matrices, too, ranks share the tokens instead of all holding them (sequence
    parallelism)."""

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one copy of the model between them and read the same samples."""
        return self.tp * self.pp * self.cp

    @property
    def zero_stage(self) -> int:
        """The ZeRO stage that the engine runs."""
        return int(self.engine == "deepspeed") if self.zero is None else self.zero

    @model_validator(mode="after")
    def _each_engine_has_its_own_sharding(self) -> Self:
        if self.engine == "torch" and self.zero is not None:
            raise KeyConflict("zero", "has no meaning with engine=torch; write engine: deepspeed or remove it")
        if self.engine == "megatron" and self.zero_stage > 1:
            raise KeyConflict("zero", "engine=megatron shares optimizer state (1) or nothing (0); write one of these")
        if self.engine == "deepspeed" and self.shard == "full":
            raise KeyConflict(
                "shard",
                "full is engine=torch's sharding; with engine=deepspeed write zero: 3 instead, or engine: torch",
            )
        if self.engine == "megatron" and self.shard == "full":
            raise KeyConflict(
                "shard",
                "full is engine=torch's sharding; engine=megatron shards by tp and pp: write shard: ddp, "
                "or engine: torch",
            )
        return self

    @model_validator(mode="after")
    def _only_megatron_cuts_the_model(self) -> Self:
        for key in ("tp", "pp", "cp", "sp"):
            if self.engine != "megatron" and getattr(self, key) != type(self).model_fields[key].default:
                raise KeyConflict(
                    key, f"engine={self.engine} cannot do this, megatron can; write engine: megatron, or remove it"
                )
        if self.sp and self.tp == 1:
            raise KeyConflict(
                "sp", "shares tokens among tensor-parallel ranks, and tp=1; write a larger tp, or remove it"
            )
        return self

    @model_validator(mode="after")
    def _only_full_has_a_size(self) -> Self:
        if self.shard_size is not None and self.shard != "full":
            raise KeyConflict("shard_size", f"has no meaning with shard={self.shard}; write shard: full or remove it")
        return self

    @model_validator(mode="after")
    def _only_spread_experts_have_settings(self) -> Self:
        if self.experts is None:
            if self.ep is not None:
                raise KeyConflict("ep", "has no meaning without experts; write experts: ep or fssdp, or remove it")
            if self.fssdp != FssdpConfig():
                raise KeyConflict("fssdp", "has no meaning without experts; write experts: fssdp, or remove it")
        if self.experts == "ep":
            for key in self.fssdp.beyond_ep:
                raise KeyConflict(
                    f"fssdp.{key}",
                    "has no meaning with experts=ep, which replicates and moves no expert; "
                    "write experts: fssdp, or remove it",
                )
        return self


class EngineOverrides(Section):
    """Settings of a library that this file has no key of its own for."""

    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Merged into the config that is generated for DeepSpeed, in its own words; a key that contradicts this file is an
    error."""


class ClusterConfig(Section):
    """What is asked of Ray."""

    workers: Int = Field(default=1, gt=0)
    min_workers: Int | None = Field(default=None, gt=0)
    """Train with fewer workers, down to this many, while the cluster has no room for all; whenever room comes or goes,
    the run goes on from its last checkpoint with as many as fit. null: always with `workers`."""
    cpus_per_worker: Real = Field(default=1, gt=0)
    gpus_per_worker: Real = Field(default=0, ge=0)
    address: str = "local"
    """local: start Ray on this machine. Or the address of a cluster, or auto."""
    max_restarts: Int = Field(default=3, ge=0)
    """How often a failed group of workers is restarted from the last checkpoint."""
    collective_timeout_s: Real = Field(default=600, gt=0)
    """How long a rank waits for the others in one collective."""
    start_timeout_s: Real = Field(default=120, gt=0)
    """How long to wait for the cluster to have the resources asked for."""

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> Self:
        if self.min_workers is not None and self.min_workers > self.workers:
            raise KeyConflict("min_workers", f"must not be above workers={self.workers}")
        return self

    @property
    def world_sizes(self) -> range:
        """Every number of ranks that the run may have."""
        return range(self.min_workers or self.workers, self.workers + 1)


class CheckpointConfig(Section):
    """When to save, and how much to keep."""

    every_steps: Int = Field(default=50, gt=0)
    keep: Int = Field(default=2, gt=0)
    """Checkpoints kept; older ones are deleted once a newer one is complete."""


class RunConfig(Section):
    """Everything about a run."""

    name: str
    """Names the run and, if `output` does not, its folder."""
    seed: Int = Field(default=0, ge=0)
    model: ModelConfig
    sparsity: tuple[SparsityRule, ...] = ()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig
    parallel: ParallelConfig = ParallelConfig()
    engine_overrides: EngineOverrides = EngineOverrides()
    cluster: ClusterConfig = ClusterConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    output: str = Field(default="", validate_default=False)
    """Run folder; default runs/<name>."""

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, raw: Any) -> Any:
        return complete(raw)

    @field_validator("name")
    @classmethod
    def _fits_a_folder(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9._-]*[A-Za-z0-9_-][A-Za-z0-9._-]*", name):
            raise ValueError("may hold letters, digits and . _ - only, because it names a folder")
        return name

    @field_validator("output")
    @classmethod
    def _is_a_folder(cls, output: str) -> str:
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


def complete(raw: Any) -> Any:
    """Fill in what a run says by leaving it out: the output folder, and of each phase `data` and `optimizer`.

    Takes and returns the plain values of a YAML file. What is not of the right type stays as it is, for the schema to
    refuse.
    """
    if not isinstance(raw, dict):
        return raw
    if isinstance(raw.get("name"), str) and raw.get("output") is None:
        raw = {**raw, "output": f"runs/{raw['name']}"}
    train = raw.get("train")
    phases = train.get("phases") if isinstance(train, dict) else None
    if not isinstance(phases, list | tuple):
        return raw
    return {**raw, "train": {**train, "phases": [_complete_phase(raw, phase) for phase in phases]}}


def _complete_phase(raw: dict[str, Any], phase: Any) -> Any:
    if not isinstance(phase, dict):
        return phase
    sections: dict[str, type[Section]] = {"data": DataConfig, "optimizer": OptimizerConfig}
    inherited = {key: _with_defaults(section, raw.get(key) or {}) for key, section in sections.items()}
    return {**phase, **{key: _merge(inherited[key], phase.get(key) or {}) for key in sections}}


def _with_defaults(section: type[Section], written: Any) -> Any:
    """Fill in what a section of which no key is required says by leaving keys out, its `kind` above all.

    Where there is a choice of sections, what is written stays as it is, for the schema to refuse if it has no `kind`.
    """
    written = _plain(written)
    if not isinstance(written, dict):
        return written
    values = section().model_dump()
    for key, value in written.items():
        inside = section.model_fields[key].annotation if key in section.model_fields else None
        if isinstance(inside, type) and issubclass(inside, Section):
            value = _with_defaults(inside, value)
        values[key] = value
    return values


def _merge(base: Any, override: Any) -> Any:
    """Deep merge of sections, in which one that changes its `kind` starts from nothing."""
    base, override = _plain(base), _plain(override)
    if isinstance(base, list | tuple) and len(base) == 1 and isinstance(override, dict):
        return _merge(base[0], override)  # one source, which a list of one stands for
    if isinstance(base, str) and isinstance(override, dict):
        base = tokenizer_from_text(base)
    if not isinstance(base, dict) or not isinstance(override, dict):
        return override
    if override.get("kind", base.get("kind")) != base.get("kind"):
        return override
    changed = {key: _merge(base.get(key), value) for key, value in override.items()}
    return {**base, **changed}


def _plain(value: Any) -> Any:
    return value.model_dump() if isinstance(value, Section) else value
