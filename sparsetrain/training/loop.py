"""The training loop: a config becomes ranks, batches, a model on an engine, masks, steps, checkpoints and a summary."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from sparsetrain.config import RunConfig
from sparsetrain.data import Dataset
from sparsetrain.engines import Engine
from sparsetrain.errors import TrainingError
from sparsetrain.parallel import World, join_world, told_if_a_rank_is_lost
from sparsetrain.planning.flops import ModelFlops, parameter_counts
from sparsetrain.training.accounting import Accountant
from sparsetrain.training.checkpointing import Checkpoints
from sparsetrain.training.checks import preflight
from sparsetrain.training.describe import describe_phase
from sparsetrain.training.evaluation import evaluate
from sparsetrain.training.events import EvalDone, Notice, PhaseStarted, Reporter, RunFinished, RunStarted, StepDone
from sparsetrain.training.generation import sample_text
from sparsetrain.training.kernel_choices import KernelChoices
from sparsetrain.training.memory import out_of_memory_advice
from sparsetrain.training.phase_plan import PhasePlan, plan_phases
from sparsetrain.training.profiling import Profiler
from sparsetrain.training.recorder import Recorder, record
from sparsetrain.training.run_folder import OnExisting, RunFolder
from sparsetrain.training.setup import build_engine, check_expert_memory, max_seq_len, measure_peak
from sparsetrain.training.sparse_layers import SparseLayers
from sparsetrain.training.sparse_phase import PhaseSparsity
from sparsetrain.training.state import RunState
from sparsetrain.training.step import train_step


@dataclass(frozen=True)
class Run:
    """What the phases of a run share."""

    config: RunConfig
    world: World
    folder: RunFolder
    datasets: list[Dataset]
    """By phase."""
    plans: list[PhasePlan]
    engine: Engine
    sparsity: PhaseSparsity
    checkpoints: Checkpoints
    kernels: KernelChoices


def train(
    config: RunConfig,
    *,
    on_existing: OnExisting = "refuse",
    reporter: Reporter | None = None,
    profile: bool = False,
) -> dict[str, Any]:
    """Train in this process: alone, or as one of the ranks that torchrun or Ray started.

    Args:
        config: The run.
        on_existing: What to do when the run folder already holds a run: refuse, resume it from its last checkpoint, or
            overwrite it.
        reporter: Called on rank 0 with every event.
        profile: Write a torch.profiler trace of a few steps into the run folder.

    Returns:
        What summary.json holds; the same on all ranks.

    Raises:
        SparsetrainError: The config does not fit the machine, the data or the run folder; or training had to stop.
        RankLostError: Another rank has stopped, or did not come to a collective within cluster.collective_timeout_s.
    """
    with join_world(config) as world, _errors_explained(config), contextlib.ExitStack() as opened:
        datasets = preflight(config, world_size=world.size).datasets
        check_expert_memory(config, world)
        # Only now that nothing else can be wrong: with "overwrite" an old run is deleted here.
        folder = opened.enter_context(RunFolder.open(config, on_existing, world))
        folder.describe_data(datasets)
        engine = build_engine(config, world, datasets[0].tokenizer)
        sparsity = PhaseSparsity(config, engine)
        checkpoints = Checkpoints(folder.checkpoints, config, engine, sparsity)
        run = Run(config, world, folder, datasets, plan_phases(config), engine, sparsity, checkpoints, KernelChoices())
        state = checkpoints.resume_or_start(lambda phase: begin_phase(run, phase, keep_state=False))
        peak_flops = measure_peak(config, world)
        with (
            record(folder.path, config, world, reporter, state) as recorder,
            Profiler(folder.path, world, profile) as profiler,
        ):
            _announce(run, state, recorder, peak_flops)
            for plan in run.plans[state.phase :]:
                train_phase(run, plan, state, recorder, profiler, peak_flops)
        summary = _finish(run, state, peak_flops)
        recorder(RunFinished(summary))
        return summary


def train_phase(
    run: Run, plan: PhasePlan, state: RunState, record: Recorder, profiler: Profiler, peak_flops: float
) -> None:
    """Train one phase, from where the run stands in it to its end."""
    config, dataset = run.config, run.datasets[plan.index]
    if state.phase_step == 0:
        begin_phase(run, plan.index, keep_state=plan.phase.optimizer_state == "keep")
    record(_phase_started(run, plan, state))
    if state.phase_step == 0:
        state.current.eval_before = _evaluate(run, plan, state, record, "start")
    layers = SparseLayers(
        run.engine.module, run.sparsity.current, config, seq_len=plan.seq_len, device=run.world.device.type
    )
    for message in layers.notices():
        record(Notice(message))
    accountant = Accountant(run.sparsity.current, layers, phase_flops(run, plan.index), config.train, peak_flops)
    while state.phase_step < plan.num_steps:
        result = train_step(run.engine, run.sparsity.current, dataset, plan, config.train, state, run.world)
        record(StepDone(plan.phase.name, accountant.count(plan, state, result)))
        for choice in run.kernels.after_step(plan.index):
            record(Notice(choice))
        record.expert_load(state.step, result.experts)
        profiler.step_done()
        with accountant.paused():
            if state.phase_step == plan.num_steps:
                break
            if state.phase_step % config.train.eval_every_steps == 0:
                _evaluate(run, plan, state, record, "during")
            if state.step % config.checkpoint.every_steps == 0:
                _save(run, state, record)
    state.current.eval_after = _evaluate(run, plan, state, record, "end")
    run.sparsity.end()
    state.next_phase()
    _save(run, state, record)


def _save(run: Run, state: RunState, record: Recorder) -> None:
    record.before_checkpoint()
    record(run.checkpoints.save(state))


def begin_phase(run: Run, phase: int, *, keep_state: bool) -> None:
    """Give the engine a phase's optimizer, and the masks what they begin it with; collective."""
    if phase > 0:  # the first phase's is the one that the engine was built with
        run.engine.use_optimizer(run.config.phases[phase].optimizer, keep_state=keep_state)
    run.sparsity.begin(run.plans[phase], phase_flops(run, phase))


def phase_flops(run: Run, phase: int) -> ModelFlops:
    """What a token costs at a phase's sample length."""
    return ModelFlops.of(run.engine.module, run.plans[phase].seq_len)


def _evaluate(
    run: Run, plan: PhasePlan, state: RunState, record: Recorder, when: Literal["start", "during", "end"]
) -> float | None:
    """Held-out bits per byte of the phase's data; None where nothing is held out."""
    train = run.config.train
    result = evaluate(
        run.engine.evaluate,
        run.datasets[plan.index],
        run.world,
        batch_size=train.micro_batch_size,
        max_tokens=train.eval_tokens,
    )
    if result is None:
        return None
    state.eval_loss = result.loss
    record(EvalDone(plan.phase.name, state.step, when, result.loss, result.bits_per_byte, result.num_tokens))
    return result.bits_per_byte


def _announce(run: Run, state: RunState, record: Recorder, peak_flops: float) -> None:
    """Say what is about to be trained, and where; make sure that its checkpoints will fit there."""
    parameters = parameter_counts(run.engine.module)
    num_parameters = parameters.total
    run.folder.check_space(num_parameters, run.config.checkpoint.keep)
    record(
        RunStarted(
            name=run.config.name,
            folder=str(run.folder.path),
            num_parameters=num_parameters,
            active_parameters=parameters.active if parameters.idle else None,
            total_tokens=sum(plan.num_tokens for plan in run.plans),
            world_size=run.world.size,
            device=run.engine.describe(),
            matmul_peak_flops=peak_flops,
            resumed_from_step=state.step if state.resumed else None,
        )
    )
    for notice in run.checkpoints.notices:
        record(notice)
    texts = [notice for dataset in run.datasets for notice in dataset.notices]
    for message in dict.fromkeys([*run.folder.notices, *texts]):
        record(Notice(message))
    if run.config.train.compile:
        record(
            Notice("train.compile: the first step of each phase compiles the model, a minute or more on a cold cache")
        )


def _phase_started(run: Run, plan: PhasePlan, state: RunState) -> PhaseStarted:
    return PhaseStarted(
        name=plan.phase.name,
        index=plan.index,
        num_phases=len(run.plans),
        first_step=plan.first_step,
        num_steps=plan.num_steps,
        num_tokens=plan.num_tokens,
        summary=describe_phase(run.config, plan.index),
    )


def _finish(run: Run, state: RunState, peak_flops: float) -> dict[str, Any]:
    """Let the model write a sample, and save the summary; collective, and returns the same everywhere."""
    sample = sample_text(
        run.engine.next_logits,
        run.datasets[-1].tokenizer,
        "",
        max_tokens=run.config.train.sample_tokens,
        context=max_seq_len(run.config),
    )
    parameters = parameter_counts(run.engine.module)
    return run.folder.finish(run.config, state, parameters=parameters, peak_flops=peak_flops, sample=sample)


@contextlib.contextmanager
def _errors_explained(config: RunConfig) -> Iterator[None]:
    """Say what helps where memory has run out, and where to look when another rank is gone."""
    try:
        with told_if_a_rank_is_lost(config):
            yield
    except (RuntimeError, MemoryError) as error:
        advice = out_of_memory_advice(error, config.train.micro_batch_size)
        if advice is None:
            raise
        raise TrainingError(advice) from error
