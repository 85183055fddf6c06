"""What the kernels' dispatcher chose in a run, for its log."""

from sparsetrain_kernels import dispatch

_MOST = 12
"""Choices that are told at once."""


class KernelChoices:
    """Tells each choice once: the problem, the implementation, and the times that it was chosen by."""

    def __init__(self) -> None:
        dispatch.forget_choices()  # those of an earlier run in this process
        self._told: set[str] = set()
        self._phases: set[int] = set()

    def after_step(self, phase: int) -> list[str]:
        """Sentences on what the first step of a phase was the first to need, nothing after other steps.

        Masks that grow sparser choose anew again and again: who wants to know of those asks the dispatcher.
        """
        if phase in self._phases:
            return []
        self._phases.add(phase)
        new = [text for text in dict.fromkeys(map(str, dispatch.choices())) if text not in self._told]
        self._told.update(new)
        if len(new) > _MOST:
            return [*new[:_MOST], f"{len(new) - _MOST} more kernels were chosen for other shapes"]
        return new
