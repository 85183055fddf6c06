"""`parallel.fssdp`: how experts are spread over ranks, and what of it is measured."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from sparsetrain.config.base import Int, Section


def _auto_or_number(value: object) -> object:
    if isinstance(value, str) and value != "auto":
        raise ValueError("expected auto or a whole number")
    return value


AutoOrNumber = Annotated[
    Annotated[Literal["auto"], Tag("<auto>")] | Annotated[Int, Field(gt=0), Tag("<number>")],
    Discriminator(lambda value: "<auto>" if isinstance(value, str) else "<number>"),
    BeforeValidator(_auto_or_number),
]
"""The discriminator makes an error speak of what was written; `<>` keeps its tags apart from keys."""


class FssdpConfig(Section):
    """Fully sharded sparse data parallelism (arXiv 2502.02581): replicas of hot experts, made anew each step.

    `dispatch` and `pipeline` hold for plain expert parallelism, too; the rest does not.
    """

    spare_slots: Int = Field(default=1, ge=0)
    """Replicas that a rank may hold of each layer; 0 is expert parallelism."""
    hot_experts: Int | None = Field(default=None, ge=0)
    """Experts of a layer that may have replicas; null: as many as help, or with placement=paper and replan=auto, as the
    paper does, as many as are measured to travel while attention computes."""
    forecast_steps: Int = Field(default=5, gt=0)
    """Steps whose mean load stands for that of the next one."""
    reshard_every_steps: Int = Field(default=100, ge=0)
    """How often experts may change owners; 0 for never."""
    replan: Literal["auto", "never", "always"] = "auto"
    """Make a new plan once the router has spoken: where measured costs say that it pays, never, or always. With auto
    alone are replicas left out where measured costs say that they do not pay; with the others (and a `pipeline` that is
    a number) nothing depends on measurements, and a run on the same CPUs repeats bitwise."""
    rematerialise: bool = False
    """Free replicas after the forward pass and gather them again in the backward pass: less memory, more transfers."""
    dispatch: Literal["capacity", "paper"] = "capacity"
    """Split the tokens of an expert among its replicas by remaining capacity, or as the paper does."""
    placement: Literal["best", "paper"] = "best"
    """Choose replicas by the best of several plans, or as the paper does."""
    pipeline: AutoOrNumber = "auto"
    """Chunks in which tokens travel while others are computed; auto: what is measured to be fastest."""

    @property
    def beyond_ep(self) -> dict[str, object]:
        """Keys that say something of replicas and moving owners, with their values; those at their defaults do not."""
        default = FssdpConfig.model_construct()
        return {
            key: value for key, value in self if key not in ("dispatch", "pipeline") and value != getattr(default, key)
        }
