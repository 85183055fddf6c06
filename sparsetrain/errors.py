"""The errors a user can cause.

Every one of them carries a message that names the key (or file), the value and the fix. The command line prints that
message alone and exits with code 2; a traceback is only ever shown for a bug of ours.
"""


class SparsetrainError(Exception):
    """Base of every error that is the user's to mend; `str(error)` is the whole message."""


class ConfigError(SparsetrainError):
    """A YAML file, an override or a combination of settings is wrong."""


class DataError(SparsetrainError):
    """A corpus, a tokenizer or a token shard is missing, damaged or does not match."""


class ShardingError(SparsetrainError):
    """A weight is laid out over ranks in a way that cannot be described or asked for."""


class CheckpointError(SparsetrainError):
    """A checkpoint is missing, damaged or belongs to another model."""


class RunFolderError(SparsetrainError):
    """The output folder cannot be used: it holds another run, is not writable, or its disk is full."""


class ClusterError(SparsetrainError):
    """Ray, or the resources asked of it, cannot be had."""


class RankLostError(ClusterError):
    """Another rank has stopped, or did not come to a collective in time; its own output says why."""


class TrainingError(SparsetrainError):
    """Training cannot go on: non-finite losses beyond the limit, or memory is exhausted."""


class SparsityError(SparsetrainError):
    """A sparse layer is asked for something that its weight or its pattern cannot be."""


class PlacementError(SparsetrainError):
    """Experts, their replicas or a load trace do not fit the model or the devices."""


class MoeError(SparsetrainError):
    """A mixture-of-experts layer is asked for something that cannot be."""
