"""Plans of replicas for several layers at once, in units of the mean device load."""

from dataclasses import dataclass

import numpy as np

from sparsetrain.moe.placement.topology import FloatArray, IntArray

TINY = 1e-9
"""Loads that differ by less are equal: what rounding leaves of sums of a few thousand terms."""


@dataclass(frozen=True)
class Plan:
    """Replicas of several layers, and how full the fullest device of each layer would be.

    Args:
        layer_R: int64, the layer of each replica.
        expert_R: int64, its expert.
        device_R: int64, the device that it goes to.
        peak_L: float64 [L], fullest over mean device.
    """

    layer_R: IntArray
    expert_R: IntArray
    device_R: IntArray
    peak_L: FloatArray

    @staticmethod
    def gather(found: list[tuple[IntArray, IntArray, IntArray]], peak_L: FloatArray) -> "Plan":
        """Join layers, experts and devices of replicas found one after another."""
        none = np.zeros(0, dtype=np.int64)
        layer_R, expert_R, device_R = (np.concatenate(part) for part in zip((none,) * 3, *found, strict=True))
        return Plan(layer_R, expert_R, device_R, peak_L)

    def with_layers(self, layer_L: IntArray, other: "Plan") -> "Plan":
        """This plan, but for the layers `layer_L`, which are those of another plan in that order."""
        is_other_L = np.zeros(len(self.peak_L), dtype=np.bool_)
        is_other_L[layer_L] = True
        keep_R = ~is_other_L[self.layer_R]
        peak_L = self.peak_L.copy()
        peak_L[layer_L] = other.peak_L
        kept = (self.layer_R[keep_R], self.expert_R[keep_R], self.device_R[keep_R])
        return Plan.gather([kept, (layer_L[other.layer_R], other.expert_R, other.device_R)], peak_L)

    def only_layers(self, layer_L: IntArray) -> "Plan":
        """The layers `layer_L` of this plan, numbered from 0 in that order."""
        number_L = np.full(len(self.peak_L), -1)
        number_L[layer_L] = np.arange(len(layer_L))
        keep_R = number_L[self.layer_R] >= 0
        return Plan(number_L[self.layer_R[keep_R]], self.expert_R[keep_R], self.device_R[keep_R], self.peak_L[layer_L])


class Layers:
    """Loads of experts and devices of several layers, each layer in units of its mean device load."""

    def __init__(self, load_LE: FloatArray, owners_LE: IntArray, num_devices: int) -> None:
        num_layers = len(load_LE)
        self.layer_L = np.arange(num_layers)
        self.owners_LE = owners_LE
        mean_L = load_LE.sum(axis=1) / num_devices
        self.load_LE: FloatArray = load_LE / np.where(mean_L > 0, mean_L, 1.0)[:, None]
        place_LE = owners_LE + self.layer_L[:, None] * num_devices
        summed = np.bincount(place_LE.ravel(), self.load_LE.ravel(), num_layers * num_devices)
        self.load_LD: FloatArray = summed.reshape(num_layers, num_devices).astype(np.float64, copy=False)
