"""The load of a run, recorded: saved with the model that it belongs to, and refused for another."""

import os
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from sparsetrain.errors import PlacementError
from sparsetrain.moe.placement.topology import IntArray

_VERSION = 1


@dataclass(frozen=True, eq=False)
class LoadTrace:
    """Rows of every expert in steps of a run.

    Args:
        step_N: int64 [N], the numbers of the steps, ascending.
        load_NLE: int64 [N, L, E], rows of each expert, summed over ranks.
        top_k: Experts of a token.
        load_NLSE: int64 [N, L, S, E], the same by source rank, where it was recorded; sums over S to `load_NLE`.

    Raises:
        PlacementError: Shapes do not agree, or a load is negative.
    """

    step_N: IntArray
    load_NLE: IntArray
    top_k: int
    load_NLSE: IntArray | None = None

    def __post_init__(self) -> None:
        if self.load_NLE.ndim != 3 or self.step_N.shape != self.load_NLE.shape[:1]:
            raise PlacementError(
                f"load of shape {self.load_NLE.shape} does not go with {self.step_N.shape} step numbers: expected "
                "[steps, layers, experts]"
            )
        if self.load_NLE.min(initial=0) < 0 or self.top_k < 1:
            raise PlacementError("a trace has a negative load, or a top_k below 1")
        if self.load_NLSE is not None and not (
            self.load_NLSE.ndim == 4 and np.array_equal(self.load_NLSE.sum(axis=2), self.load_NLE)
        ):
            raise PlacementError("a trace's loads by source rank do not sum to its loads")

    @property
    def num_layers(self) -> int:
        """L."""
        return int(self.load_NLE.shape[1])

    @property
    def num_experts(self) -> int:
        """E."""
        return int(self.load_NLE.shape[2])

    def check_model(self, num_layers: int, num_experts: int, top_k: int) -> None:
        """Refuse the trace of another model.

        Raises:
            PlacementError: It has other numbers of MoE layers or experts, or another top_k.
        """
        recorded, asked = (self.num_layers, self.num_experts, self.top_k), (num_layers, num_experts, top_k)
        if recorded != asked:
            raise PlacementError(
                "the load trace belongs to another model: it has {} MoE layers of {} experts with top_k {}, ".format(
                    *recorded
                )
                + "and this model has {} of {} with top_k {}".format(*asked)
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a compressed .npz file, whole or not at all: under another name first, then renamed.

        Raises:
            PlacementError: The file cannot be written.
        """
        target = Path(path)
        arrays: dict[str, Any] = {
            "version": np.int64(_VERSION),
            "step": self.step_N,
            "load": self.load_NLE,
            "top_k": np.int64(self.top_k),
        }
        if self.load_NLSE is not None:
            arrays["load_by_source"] = self.load_NLSE
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            with partial.open("wb") as file:
                np.savez_compressed(file, **arrays)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
        except OSError as error:
            raise PlacementError(f"cannot write the load trace {target}: {error.strerror or error}") from error
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "LoadTrace":
        """Read what `save` wrote; every byte is checked against the file's checksums.

        Raises:
            PlacementError: The file is missing, damaged or no load trace.
        """
        try:
            with zipfile.ZipFile(path) as archive:
                arrays: dict[str, Any] = {
                    name.removesuffix(".npy"): _read_array(archive, name) for name in archive.namelist()
                }
            if (version := int(arrays["version"])) != _VERSION:
                raise ValueError(f"its format is version {version}, and version {_VERSION} is read here")
            return cls(arrays["step"], arrays["load"], int(arrays["top_k"]), arrays.get("load_by_source"))
        except FileNotFoundError as error:
            raise PlacementError(f"there is no load trace at {os.fspath(path)}") from error
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, PlacementError) as error:
            raise PlacementError(f"{os.fspath(path)} is no load trace, or is damaged: {error}") from error


class TraceRecorder:
    """Collects the loads of a run's steps for a `LoadTrace`.

    Args:
        top_k: Experts of a token.
    """

    def __init__(self, top_k: int) -> None:
        self.top_k = top_k
        self._steps: list[int] = []
        self._loads: list[IntArray] = []
        self._by_source: list[IntArray] = []

    def append(self, step: int, load_LE: ArrayLike, load_LSE: ArrayLike | None = None) -> None:
        """Take in one step's load: [L, E], and [L, S, E] by source rank in every step or in none."""
        self._steps.append(step)
        self._loads.append(np.array(load_LE, dtype=np.int64))
        if load_LSE is not None:
            self._by_source.append(np.array(load_LSE, dtype=np.int64))

    def trace(self) -> LoadTrace:
        """All steps so far.

        Raises:
            PlacementError: There is none, or loads by source were given in some steps only.
        """
        if not self._steps or len(self._by_source) not in (0, len(self._steps)):
            raise PlacementError(
                f"{len(self._steps)} steps were recorded, {len(self._by_source)} of them by source: a trace needs at "
                "least one, and all or none by source"
            )
        by_source = np.stack(self._by_source) if self._by_source else None
        return LoadTrace(np.array(self._steps, dtype=np.int64), np.stack(self._loads), self.top_k, by_source)


def _read_array(archive: zipfile.ZipFile, name: str) -> IntArray:
    with archive.open(name) as file:
        array: IntArray = np.lib.format.read_array(file, allow_pickle=False)
    return array
