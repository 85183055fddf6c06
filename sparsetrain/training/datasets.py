"""The token shards of every phase."""

from sparsetrain.config import RunConfig
from sparsetrain.data import Dataset, prepare
from sparsetrain.data.cache import Progress
from sparsetrain.parallel import World


def prepare_datasets(
    config: RunConfig, world: World | None = None, on_progress: Progress | None = None
) -> list[Dataset]:
    """Build or open the token shards of each phase, by phase; rank 0 builds while the others wait.

    Every phase draws its own order of samples, so that a second phase on the same text does not repeat the first. All
    share the first one's tokenizer.

    Raises:
        DataError: A corpus or tokenizer is missing, damaged or does not match.
    """
    if world is not None and not world.is_main:
        world.barrier()
    datasets: list[Dataset] = []
    for index, phase in enumerate(config.phases):
        seed = config.seed * len(config.phases) + index
        tokenizer = datasets[0].tokenizer if datasets else None
        datasets.append(prepare(phase.data, seed=seed, tokenizer=tokenizer, on_progress=on_progress))
    if world is not None and world.is_main:
        world.barrier()
    return datasets
