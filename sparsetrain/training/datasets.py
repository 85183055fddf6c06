"""The token shards of every phase."""

from hashlib import blake2b

from sparsetrain.config import RunConfig
from sparsetrain.data import Dataset, Progress, prepare


def prepare_datasets(config: RunConfig, on_progress: Progress | None = None) -> list[Dataset]:
    """Build or open the token shards of each phase, by phase; ranks that do it at the same time build them once.

    Every phase draws its own order of samples, so that a second phase on the same text does not repeat the first. All
    share the first one's tokenizer.

    Raises:
        DataError: A corpus or tokenizer is missing, damaged or does not match.
    """
    datasets: list[Dataset] = []
    for index, phase in enumerate(config.phases):
        tokenizer = datasets[0].tokenizer if datasets else None
        seed = _phase_seed(config.seed, index)
        datasets.append(prepare(phase.data, seed=seed, tokenizer=tokenizer, on_progress=on_progress))
    return datasets


def _phase_seed(seed: int, phase: int) -> int:
    """The run's seed in the first phase, and one that has nothing to do with it in each later one."""
    if phase == 0:
        return seed
    return int.from_bytes(blake2b(f"{seed}:{phase}".encode(), digest_size=4).digest())
