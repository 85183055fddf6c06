"""What replicas cost and gain, from measured seconds: how many experts to move, and when."""

from dataclasses import dataclass, fields

from sparsetrain.errors import PlacementError


@dataclass(frozen=True)
class CostModel:
    """Seconds of the parts of one MoE layer, as measured; every decision below is a pure function of them.

    All ranks must hold the same numbers, or they will decide differently: agree on them (a mean over ranks) first.

    Args:
        row_s: Seconds of one row (a token at one of its experts) in an expert, forward and backward.
        expert_bytes: Bytes of one expert's weights as replicas receive them.
        byte_s: Seconds to move one byte of weights, or of their gradients, into a device.
        free_s: Seconds of a layer outside its experts (attention, forward and backward) that hide such transfers.

    Raises:
        PlacementError: A number is negative.
    """

    row_s: float
    expert_bytes: int
    byte_s: float
    free_s: float

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 0:
                raise PlacementError(f"{field.name} is {getattr(self, field.name)}, but a cost is never negative")

    @property
    def transfer_s(self) -> float:
        """Seconds to give a device one replica and take its gradient back: 2 · expert_bytes · byte_s."""
        return 2 * self.expert_bytes * self.byte_s

    def hot_experts(self, num_experts: int) -> int:
        """The paper's t: experts that travel for free, ⌊free_s / transfer_s⌋, no more than there are."""
        if self.transfer_s == 0:
            return num_experts
        return min(num_experts, int(self.free_s / self.transfer_s))

    def layer_s(self, rows: float, replicas: int) -> float:
        """Seconds of a layer whose fullest device has `rows` rows and receives so many replicas.

        rows · row_s + max(0, replicas · transfer_s − free_s): transfers beyond what attention hides are waited for.
        """
        return rows * self.row_s + max(0.0, replicas * self.transfer_s - self.free_s)

    def pays(self, rows_before: float, rows_after: float, replicas: int) -> bool:
        """Whether re-planning a layer after its gate is worth it.

        The gate has run, so nothing is left that would hide the new replicas' weights; their gradients can still go
        back under attention: (rows_before − rows_after) · row_s > replicas · transfer_s / 2.

        Args:
            rows_before: Rows of the fullest device with the replicas that are there.
            rows_after: The same with the new plan.
            replicas: Replicas that the device which gets most new ones has to receive.
        """
        return (rows_before - rows_after) * self.row_s > replicas * self.transfer_s / 2
