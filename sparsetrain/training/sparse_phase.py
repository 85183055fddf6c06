"""The masks of a run, from phase to phase."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from sparsetrain.config import RunConfig, SparsityRule
from sparsetrain.engines import Engine
from sparsetrain.planning.flops import ModelFlops
from sparsetrain.sparsity import Sparsifier, StepCosts, describe_parameters, match_rules
from sparsetrain.training.phase_plan import PhasePlan


class PhaseSparsity:
    """One Sparsifier a phase, each beginning with the masks that the one before left."""

    def __init__(self, config: RunConfig, engine: Engine) -> None:
        self._config = config
        self._engine = engine
        self._inherited: Mapping[str, Tensor] = {}
        self.current = Sparsifier(())
        """The current phase's; one without rules before the first."""

    def begin(self, plan: PhasePlan, flops: ModelFlops) -> None:
        """Begin a phase with the engine's current optimizer: new rules, the old masks held, or dense; collective.

        Raises:
            ConfigError: A rule does not fit the model.
        """
        self.current.detach()
        masks = {**self._inherited, **self.current.masks()}
        rules, hold = rules_of_phase(self._config, plan.index)
        costs = self._costs(rules, plan, flops)
        self.current = Sparsifier(
            rules, total_steps=plan.num_steps, seed=self._config.seed, costs=costs, hold=hold
        ).attach(self._engine.module, self._engine.optimizer, shards=self._engine.weight_shards(), masks=masks)
        self._inherited = {}

    def end(self) -> None:
        """End the current phase: its weights become what the forward pass sees of them; collective."""
        self.current.fold()

    def masks(self) -> dict[str, Tensor]:
        """Local bool masks by weight name, for a checkpoint."""
        return self.current.masks()

    def inherit(self, masks: Mapping[str, Tensor]) -> None:
        """Take the masks of a checkpoint between two phases as what the earlier one left."""
        self._inherited = masks

    def restore(self, masks: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Go on inside a phase that has begun, as a checkpoint says; collective."""
        self.current.load_masks(masks)
        self.current.load_state_dict(state)

    def _costs(self, rules: Sequence[SparsityRule], plan: PhasePlan, flops: ModelFlops) -> StepCosts:
        """What a step costs, divided into what the rules make cheaper and what they leave alone."""
        owned = {
            weight.name for mine in match_rules(rules, describe_parameters(self._engine.module)) for weight in mine
        }
        ruled = {name: 3 * forward for name, forward in flops.linear.items() if name in owned}
        return StepCosts(plan.tokens_per_step().tolist(), flops.train_per_token() - sum(ruled.values()), ruled)


def rules_of_phase(config: RunConfig, phase: int) -> tuple[tuple[SparsityRule, ...], bool]:
    """A phase's rules, and whether they only hold the masks of an earlier phase."""
    phases = config.phases
    source = phase
    while phases[source].sparsity == "keep":
        source -= 1
    rules = phases[source].sparsity
    assert rules != "keep", "the first phase has rules of its own"
    return rules, source != phase
