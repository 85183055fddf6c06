"""Which of a few settings is fastest, found by trying each for some steps."""

from collections.abc import Sequence


class Trial:
    """Tries settings in turn, keeps the fastest, and looks again after a while, because loads change.

    Args:
        settings: To choose from; the first is used until the trial begins.
        steps_each: Steps that each is tried for; the first of them is not counted.
        again_after: Steps until the next trial.
    """

    def __init__(self, settings: Sequence[int], *, steps_each: int = 4, again_after: int = 500) -> None:
        self._settings, self._steps_each, self._again_after = tuple(settings), steps_each, again_after
        self._step = 0
        self._costs: dict[int, float] = {}
        self.chosen = self._settings[0]
        """What to use in the next step."""

    def observe(self, cost: float) -> None:
        """Take in what a step with `chosen` cost; all ranks must be told the same."""
        if len(self._settings) == 1:
            return
        at, turn = divmod(self._step, self._steps_each)
        self._step += 1
        if at < len(self._settings):
            if turn:
                setting = self._settings[at]
                self._costs[setting] = min(cost, self._costs.get(setting, cost))
            following = self._step // self._steps_each
            if following < len(self._settings):
                self.chosen = self._settings[following]
            else:
                self.chosen = min(self._costs, key=lambda setting: self._costs[setting])
        elif self._step >= self._again_after:
            self._step, self._costs, self.chosen = 0, {}, self._settings[0]
