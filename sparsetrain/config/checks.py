"""What no single section can know: whether the sections of a run fit each other. Needs neither torch nor a cluster."""

from collections.abc import Iterator

from sparsetrain.config.attention import BlockSparseAttention
from sparsetrain.config.conflict import Conflict
from sparsetrain.config.data import BpeTokenizer, ByteTokenizer
from sparsetrain.config.megatron import megatron_conflicts, megatron_world_conflicts
from sparsetrain.config.origin import KeyPath, dotted
from sparsetrain.config.problem import InvalidConfig, Problem
from sparsetrain.config.run import RunConfig
from sparsetrain.config.units import divisors_near

_BYTE_VOCABULARY = 257
"""256 bytes and end-of-document."""


def check_config(config: RunConfig) -> None:
    """Check everything about a run that does not depend on the number of ranks.

    Raises:
        ConfigError: Sections do not fit each other; the message lists all that do not.
    """
    _raise(config, list(conflicts(config)))


def check_world(config: RunConfig, world_size: int) -> None:
    """Check that a run can be laid over `world_size` ranks.

    Raises:
        ConfigError: The batch or the mesh does not divide; the message lists all that does not.
    """
    _raise(config, list(world_conflicts(config, world_size)))


def conflicts(config: RunConfig) -> Iterator[Conflict]:
    """What does not fit together, whatever the number of ranks."""
    yield from _batches(config)
    yield from _phase_names(config)
    yield from _tokenizers(config)
    yield from _holdouts(config)
    yield from _vocabulary(config)
    yield from _attention(config)
    yield from _resources(config)
    yield from _experts(config)
    yield from _engine(config)
    if config.parallel.engine == "megatron":
        yield from megatron_conflicts(config)


def world_conflicts(config: RunConfig, world_size: int) -> Iterator[Conflict]:
    """What does not fit `world_size` ranks."""
    ranks: KeyPath = ("cluster", "workers")
    size = config.parallel.shard_size
    if size is not None and world_size % size:
        message = f"must divide the number of ranks, {world_size}; {divisors_near(world_size, size)}"
        yield Conflict(("parallel", "shard_size"), size, message, (ranks,))
    if world_size % config.parallel.model_ranks:
        yield from megatron_world_conflicts(config, world_size)
        return
    yield from _expert_groups(config, world_size // config.parallel.pp)
    num_shares = world_size // config.parallel.model_ranks
    sharing = "ranks" if config.parallel.model_ranks == 1 else "copies of the model"
    for path, tokens in _batch_sizes(config):
        for seq_len_path, seq_len in _seq_lens(config):
            samples, rest = divmod(tokens, seq_len)
            if rest == 0 and samples % num_shares:
                message = (
                    f"{samples} samples of {seq_len} tokens, which {num_shares} {sharing} cannot share evenly; "
                    + _multiples_near(tokens, seq_len * num_shares)
                )
                yield Conflict(path, tokens, message, (ranks, seq_len_path))


def _expert_groups(config: RunConfig, world_size: int) -> Iterator[Conflict]:
    """What does not fit where experts are spread over ranks."""
    parallel, moe = config.parallel, config.model.moe
    if parallel.experts is None or moe is None:
        return
    ranks: KeyPath = ("cluster", "workers")
    if parallel.ep is not None and world_size % parallel.ep:
        message = f"must divide the number of ranks, {world_size}; {divisors_near(world_size, parallel.ep)}"
        yield Conflict(("parallel", "ep"), parallel.ep, message, (ranks,))
    elif (size := parallel.ep or world_size) > moe.num_experts:
        message = (
            f"{size} ranks cannot share the {moe.num_experts} experts of a layer, because each owns one at least; "
            + _divisor_up_to(moe.num_experts, world_size)
        )
        yield Conflict(("parallel", "ep"), parallel.ep, message, (("model", "moe", "num_experts"), ranks))


def _divisor_up_to(most: int, number: int) -> str:
    """The largest divisor of `number` that is at most `most`, for people."""
    return f"{next(size for size in range(most, 0, -1) if number % size == 0)} would do"


def _batches(config: RunConfig) -> Iterator[Conflict]:
    for path, tokens in _batch_sizes(config):
        for seq_len_path, seq_len in _seq_lens(config):
            if tokens % seq_len:
                message = f"must be a multiple of {dotted(seq_len_path)}={seq_len}; {_multiples_near(tokens, seq_len)}"
                yield Conflict(path, tokens, message, (seq_len_path,))


def _multiples_near(tokens: int, step: int) -> str:
    """The multiples of `step` on either side of `tokens`, for people."""
    below = tokens // step * step
    return f"{below} or {below + step} would do" if below else f"{below + step} would do"


def _batch_sizes(config: RunConfig) -> Iterator[tuple[KeyPath, int]]:
    yield ("train", "batch_tokens"), config.train.batch_tokens
    if config.train.batch_ramp is not None:
        yield ("train", "batch_ramp", "start_tokens"), config.train.batch_ramp.start_tokens


def _seq_lens(config: RunConfig) -> Iterator[tuple[KeyPath, int]]:
    """Each sample length that occurs, once, with the key it comes from."""
    seen: set[int] = set()
    for index, phase in enumerate(config.phases):
        if phase.data.seq_len not in seen:
            seen.add(phase.data.seq_len)
            yield (*_phase(index), "data", "seq_len"), phase.data.seq_len


def _phase_names(config: RunConfig) -> Iterator[Conflict]:
    seen: dict[str, KeyPath] = {}
    for index, phase in enumerate(config.phases):
        path = (*_phase(index), "name") if index else ("train", "phase_name")
        if phase.name in seen:
            other = seen[phase.name]
            yield Conflict(path, phase.name, f"{dotted(other)} has the same name; give each phase its own", (other,))
        seen.setdefault(phase.name, path)


def _tokenizers(config: RunConfig) -> Iterator[Conflict]:
    first = config.data.tokenizer
    for index, phase in enumerate(config.train.phases, start=1):
        if phase.data.tokenizer != first:
            path = (*_phase(index), "data", "tokenizer")
            message = "differs from data.tokenizer, and the model has one vocabulary; remove it from this phase"
            yield Conflict(path, phase.data.tokenizer.kind, message, (("data", "tokenizer"),))


def _holdouts(config: RunConfig) -> Iterator[Conflict]:
    for index, phase in enumerate(config.train.phases, start=1):
        if phase.data.holdout != config.data.holdout:
            path = (*_phase(index), "data", "holdout")
            message = "differs from data.holdout, and every phase holds out the same documents; remove it here"
            yield Conflict(path, phase.data.holdout, message, (("data", "holdout"),))


def _vocabulary(config: RunConfig) -> Iterator[Conflict]:
    rows, tokenizer = config.model.vocab_size, config.data.tokenizer
    if isinstance(tokenizer, ByteTokenizer):
        needed = _BYTE_VOCABULARY
    elif isinstance(tokenizer, BpeTokenizer):
        needed = tokenizer.vocab_size
    else:
        return  # the file says, and preflight reads it
    if rows is not None and rows < needed:
        message = f"the {tokenizer.kind} tokenizer has {needed} tokens; write at least that, or remove the key"
        yield Conflict(("model", "vocab_size"), rows, message, (("data", "tokenizer"),))


def _attention(config: RunConfig) -> Iterator[Conflict]:
    attention = config.model.attention
    if isinstance(attention, BlockSparseAttention):
        for path, seq_len in _seq_lens(config):
            if seq_len <= attention.block:
                message = f"must be below {dotted(path)}={seq_len}, or a sample is one block, which sees itself"
                yield Conflict(("model", "attention", "block"), attention.block, message, (path,))


def _resources(config: RunConfig) -> Iterator[Conflict]:
    cpus, gpus = config.cluster.cpus_per_worker, config.cluster.gpus_per_worker
    if cpus > 1 and cpus != int(cpus):
        yield Conflict(("cluster", "cpus_per_worker"), cpus, "above 1 it must be a whole number")
    if gpus not in (0, 1):
        message = "a worker drives one GPU: write 1 (or 0 for none), and set cluster.workers to the number of GPUs"
        yield Conflict(("cluster", "gpus_per_worker"), gpus, message)


def _experts(config: RunConfig) -> Iterator[Conflict]:
    if config.parallel.experts is not None and config.model.moe is None:
        message = "the model has no experts; add model.moe, or remove this key"
        yield Conflict(("parallel", "experts"), config.parallel.experts, message, (("model", "moe"),))
    if config.train.upcycle is not None and config.model.moe is None:
        message = "the model has no experts to be made of a dense model; add model.moe, or remove this key"
        yield Conflict(("train", "upcycle"), True, message, (("model", "moe"),))


def _engine(config: RunConfig) -> Iterator[Conflict]:
    engine: KeyPath = ("parallel", "engine")
    if config.parallel.engine != "deepspeed" and config.engine_overrides.deepspeed:
        message = f"has no meaning with parallel.engine={config.parallel.engine}; remove it, or change the engine"
        yield Conflict(("engine_overrides", "deepspeed"), dict(config.engine_overrides.deepspeed), message, (engine,))
    if config.parallel.engine != "torch" and config.train.compile:
        message = "compiles with parallel.engine=torch only; remove it, or change the engine"
        yield Conflict(("train", "compile"), True, message, (engine,))


def _phase(index: int) -> KeyPath:
    """The path under which a phase keeps its sections; the first phase's are the run's own."""
    return ("train", "phases", index - 1) if index else ()


def _raise(config: RunConfig, found: list[Conflict]) -> None:
    if found:
        raise InvalidConfig(config.name, [Problem(c.path, c.message, None, c.value) for c in found])
