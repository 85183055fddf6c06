"""A finished (or interrupted) run, put to use: evaluate its last checkpoint, or let it write."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sparsetrain.checkpoint import load_masks, load_weights, read_state
from sparsetrain.config import RunConfig, load_config
from sparsetrain.data import Batch, Tokenizer, tokenizer_from_json
from sparsetrain.errors import DataError, RunFolderError
from sparsetrain.models import Transformer
from sparsetrain.parallel import World
from sparsetrain.sharding import weight_shards
from sparsetrain.sparsity import Sparsifier
from sparsetrain.training.datasets import prepare_datasets
from sparsetrain.training.evaluation import EvalResult, evaluate
from sparsetrain.training.generation import sample_text
from sparsetrain.training.phase_plan import plan_phases
from sparsetrain.training.run_folder import CONFIG_FILE, TOKENIZER_FILE
from sparsetrain.training.setup import max_seq_len, vocab_rows
from sparsetrain.training.sparse_phase import rules_of_phase
from sparsetrain.training.state import RunState


@dataclass(frozen=True)
class TrainedRun:
    """What a run folder holds, whole, in this process."""

    config: RunConfig
    model: Transformer
    tokenizer: Tokenizer
    checkpoint: Path

    @classmethod
    def load(cls, folder: Path) -> "TrainedRun":
        """Open a run folder's newest intact checkpoint, on the GPU if there is one.

        Raises:
            RunFolderError: It is not a run folder, or its tokenizer is damaged.
            CheckpointError: It has no intact checkpoint.
        """
        folder = Path(folder)
        for name in (CONFIG_FILE, TOKENIZER_FILE):
            if not (folder / name).is_file():
                raise RunFolderError(f"{folder}: not a run folder, {name} is missing; name the output folder of a run")
        config = load_config(folder / CONFIG_FILE, was_trained=True)
        tokenizer = _load_tokenizer(folder / TOKENIZER_FILE)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = Transformer(config.model, vocab_rows(config, tokenizer.vocab_size), max_seq_len(config))
        checkpoint = load_weights(folder, weight_shards(model))
        _fold_recipes(config, model, checkpoint)
        return cls(config, model.eval(), tokenizer, checkpoint)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.embed.weight.device

    @torch.no_grad()
    def next_logits(self, tokens_T: Tensor) -> Tensor:
        """Tokens int64 [T] to the logits of the next one, [V]."""
        logits_1TV: Tensor = self.model(tokens_T.unsqueeze(0).to(self.device))
        return logits_1TV[0, -1]

    @torch.no_grad()
    def loss_of(self, batch: Batch) -> Tensor:
        """Sum of the losses over a batch's counted targets."""
        batch = batch.to(self.device)
        loss: Tensor = self.model(batch.tokens, batch.targets, batch.document_ids)
        return loss


def _fold_recipes(config: RunConfig, model: Transformer, checkpoint: Path) -> None:
    """Let the weights of n:m recipes be what the forward pass saw when the checkpoint was saved.

    At the end of a phase they are that already; inside one, a checkpoint holds the dense weights that learn.
    """
    saved = read_state(checkpoint)
    state = RunState.from_dict(saved["run"])
    if state.phase_step == 0:
        return
    rules, hold = rules_of_phase(config, state.phase)
    if hold or not any(rule.is_recipe for rule in rules):
        return
    plan = plan_phases(config)[state.phase]
    shards = weight_shards(model)
    sparsifier = Sparsifier(rules, total_steps=plan.num_steps, seed=config.seed).attach(model, None)
    load_weights(checkpoint, shards)  # again: rules have zeroed theirs, by masks of the phase's first step
    sparsifier.load_masks(load_masks(checkpoint, shards))
    sparsifier.load_state_dict(saved["sparsity"])
    sparsifier.fold()


def _load_tokenizer(path: Path) -> Tokenizer:
    try:
        return tokenizer_from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, DataError) as error:
        raise RunFolderError(
            f"{path}: cannot be read ({error}); to write it anew: "
            f"sparsetrain train {path.parent / CONFIG_FILE} --resume"
        ) from error


def evaluate_run(folder: Path) -> dict[str, EvalResult]:
    """Held-out loss of a run's last checkpoint on each phase's data, by phase, in fp32.

    Raises:
        RunFolderError: It is not a run folder, or no phase holds out any text.
        CheckpointError: It has no intact checkpoint.
        DataError: The run's corpus is no longer there.
    """
    run = TrainedRun.load(folder)
    train = run.config.train
    results: dict[str, EvalResult] = {}
    for phase, dataset in zip(run.config.phases, prepare_datasets(run.config), strict=True):
        result = evaluate(
            run.loss_of,
            dataset,
            World(0, 1, run.device),
            batch_size=train.micro_batch_size,
            max_tokens=train.eval_tokens,
        )
        if result is not None:
            results[phase.name] = result
    if not results:
        raise RunFolderError(f"{folder}: data.holdout=0, so no text was held out to evaluate on")
    return results


def generate_text(
    folder: Path,
    prompt: str,
    *,
    max_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = 50,
    seed: int = 0,
) -> str:
    """What a run's last checkpoint writes after `prompt`; arguments as for `sample_text`.

    Raises:
        RunFolderError: It is not a run folder.
        CheckpointError: It has no intact checkpoint.
    """
    run = TrainedRun.load(folder)
    return sample_text(
        run.next_logits,
        run.tokenizer,
        prompt,
        max_tokens=max_tokens,
        context=max_seq_len(run.config),
        temperature=temperature,
        top_k=top_k,
        seed=seed,
    )
