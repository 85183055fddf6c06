"""Shards as torch.distributed.checkpoint (DCP) sees them: one code path for every layout.

A `GlobalTensor` tells DCP which boxes of a whole tensor are here. DCP writes every box once, spreading copies that
several ranks hold evenly over them, and on loading reads from whatever boxes were saved what the boxes here need.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from sparsetrain.checkpoint.agreement import in_group
from sparsetrain.checkpoint.folder import writing_to
from sparsetrain.errors import SparsetrainError
from sparsetrain.sharding import WeightShard


@dataclass(frozen=True)
class Box:
    """A box of a whole tensor, and the memory that holds it."""

    offsets: tuple[int, ...]
    data: Tensor

    @property
    def chunk(self) -> ChunkStorageMetadata:
        """The box in DCP's terms."""
        return ChunkStorageMetadata(offsets=torch.Size(self.offsets), sizes=self.data.shape)


class GlobalTensor:
    """The boxes of one whole tensor that this rank holds, in the protocol by which DCP saves and loads.

    Args:
        shape: Shape of the whole tensor.
        boxes: Boxes here, which do not overlap; none where this rank holds nothing of the tensor.
    """

    def __init__(self, shape: Sequence[int], boxes: Sequence[Box]) -> None:
        self._shape = torch.Size(shape)
        self._boxes = {box.offsets: box for box in boxes}

    def size(self) -> torch.Size:
        """Shape of the whole tensor; DCP compares it with the saved one."""
        return self._shape

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(name, box.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=box.chunk, properties=TensorProperties(dtype=box.data.dtype), size=self._shape
                ),
            )
            for box in self._boxes.values()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [box.chunk for box in self._boxes.values()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self._boxes[tuple(index.offset)].data


def shard_tensor(shard: WeightShard, local: Tensor) -> GlobalTensor:
    """What `local`, of `shard.local_shape`, is of a whole tensor shaped like the shard's weight."""
    boxes = shard.rectangles()
    if len(boxes) == 1 and boxes[0].sizes == tuple(local.shape):
        return GlobalTensor(shard.global_shape, [Box(boxes[0].offsets, local)])
    return GlobalTensor(shard.global_shape, [Box(box.offsets, box.view(local)) for box in boxes])


def save_tensors(tensors: Mapping[str, GlobalTensor], folder: Path) -> None:
    """Write whole tensors into `folder`, each rank its share; collective over the world.

    Raises:
        CheckpointError: A rank could not write; every rank raises it.
    """
    with _errors_of_any_rank():
        save(dict(tensors), storage_writer=_Writer(folder), planner=_SavePlanner(), no_dist=not in_group())


def load_tensors(tensors: Mapping[str, GlobalTensor], folder: Path, *, alone: bool = False) -> None:
    """Fill the boxes of whole tensors from `folder`, whatever boxes were saved; collective, unless `alone`."""
    with _errors_of_any_rank():
        load(
            dict(tensors),
            storage_reader=FileSystemReader(folder),
            planner=_LoadPlanner(),
            no_dist=alone or not in_group(),
        )


def saved_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and whole shapes of the tensors saved in `folder`, whose files have been verified."""
    metadata: Metadata = FileSystemReader(folder).read_metadata()
    return {
        name: tuple(entry.size)
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


class _SavePlanner(DefaultSavePlanner):
    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        tensor: GlobalTensor = self.state_dict[index.fqn]
        return tensor.__get_tensor_shard__(index)


class _LoadPlanner(DefaultLoadPlanner):
    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        # The default first replaces what it takes for tensors on the meta device, and everything it does not know.
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        tensor: GlobalTensor = self.state_dict[index.fqn]
        return tensor.__get_tensor_shard__(index)


class _Writer(FileSystemWriter):
    """Names folder and fix when the disk fails, while the cause is still known: DCP passes on only the outer error."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        with writing_to(Path(self.path).parent):
            return super().prepare_local_plan(plan)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        with writing_to(Path(self.path).parent):
            return super().write_data(plan, planner)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        with writing_to(Path(self.path).parent):
            super().finish(metadata, results)


@contextmanager
def _errors_of_any_rank() -> Iterator[None]:
    """DCP raises on every rank what failed on any; take the user's error out of its wrapping."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as error:
        failures = {rank: failure for rank, (failure, _) in error.failures.items()}
        bugs = [failure for failure in failures.values() if not isinstance(failure, SparsetrainError)]
        if bugs:
            raise RuntimeError(str(error)) from bugs[0]
        rank, first = next(iter(failures.items()))
        where = f" (rank {rank})" if in_group() else ""
        raise type(first)(f"{first}{where}") from None
