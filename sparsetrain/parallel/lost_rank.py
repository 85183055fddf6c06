"""Another rank is gone: told apart from other errors, so that a person looks where the cause is."""

import contextlib
import re
from collections.abc import Iterator

from sparsetrain.config import RunConfig
from sparsetrain.errors import RankLostError

_SIGNS = (
    "connection closed by peer",
    "connection reset by peer",
    "connectionreset",
    "remote process exited",
    "broken pipe",
    "timed out waiting",
)
"""What gloo and NCCL say, in lower case, where the fault is not this rank's."""


def lost_a_rank(error: BaseException) -> bool:
    """Whether an error means that another rank has stopped, or has not come to a collective in time."""
    return isinstance(error, RankLostError) or any(sign in str(error).lower() for sign in _SIGNS)


def _first_sentence(error: RuntimeError) -> str:
    """What a library says, without its source file and its advice."""
    return re.sub(r"^\[\S*:\d+\] ", "", str(error).splitlines()[0]).partition(". ")[0]


@contextlib.contextmanager
def told_if_a_rank_is_lost(config: RunConfig) -> Iterator[None]:
    """Raise RankLostError for what a collective inside raises when another rank is gone."""
    try:
        yield
    except RuntimeError as error:
        if not lost_a_rank(error):
            raise
        notes = [note.partition(":")[0] for note in getattr(error, "__notes__", ())]
        where = f", {notes[0]}" if notes else ""  # what was being done, if the collective's caller has noted it
        raise RankLostError(
            f"another rank has stopped, or did not come within cluster.collective_timeout_s="
            f"{config.cluster.collective_timeout_s:g}{where} ({_first_sentence(error)}). Its own output says why; go "
            "on from the last checkpoint with --resume"
        ) from error
