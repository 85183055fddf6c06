"""What a method decides: the first masks, when they change, and to what."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from sparsetrain.config.sparsity import SparsityRule
from sparsetrain.sparsity.choose import choose_masks
from sparsetrain.sparsity.schedules import Timetable
from sparsetrain.sparsity.weights import SparseWeight


class Method(ABC):
    """The life of one rule's masks over a phase. The Sparsifier calls it and applies what it returns.

    Where masks are due after a step, `see_gradients` is called before it, while its gradients are still dense, and
    `next_masks` after it.
    """

    zeros_in_parameter: ClassVar[bool]
    """True: zeroed weights are 0 in the parameter itself, and so are their moments and gradient. False: only in the
    effective weight of the forward pass, and the parameter goes on learning."""

    def __init__(self, rule: SparsityRule, *, timetable: Timetable, seed: int) -> None:
        self.rule = rule
        self.timetable = timetable
        self.seed = seed

    @abstractmethod
    def first_masks(self, weights: Sequence[SparseWeight]) -> list[Tensor]:
        """Masks before the first step, bool of the local shapes; `weights` carry those that a phase before left."""

    @abstractmethod
    def is_due(self, step: int) -> bool:
        """Whether masks change once `step` optimizer steps are done."""

    @abstractmethod
    def next_masks(self, weights: Sequence[SparseWeight], step: int) -> list[Tensor]:
        """Masks that hold once `step` optimizer steps are done."""

    def see_gradients(self, weights: Sequence[SparseWeight]) -> None:  # noqa: B027 (most methods need not)
        """Read the dense gradients of a step after which masks are due; they are masked right after."""

    def choose(self, weights: Sequence[SparseWeight], step: int, *, within: bool) -> list[Tensor]:
        """Masks at the timetable's sparsity, by the rule's criterion and distribution."""
        sparsity = self.timetable.sparsity_after(step)
        return choose_masks(weights, self.rule, sparsity, seed=self.seed, within=within)
