"""A small model with a stepped optimizer and masks, and the folder that its checkpoints go to."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sparsetrain.checkpoint import (
    Checkpoint,
    ensure_moments,
    load_checkpoint,
    load_optimizer_state,
    optimizer_state,
    save_checkpoint,
)
from sparsetrain.sharding import WeightShard, weight_shards


class Run:
    """What a training loop has in its hands when it saves."""

    def __init__(self, folder: Path, *, seed: int = 0, width: int = 5, hidden_bias: bool = True) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(
            nn.Linear(11, width, bias=hidden_bias), nn.Dropout(0.5), nn.Linear(width, 3, bias=False)
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.masks = {
            shard.name: torch.rand(shard.local_shape) < 0.5 for shard in self.shards if shard.name != "0.bias"
        }
        self.folder = folder

    @property
    def shards(self) -> list[WeightShard]:
        return weight_shards(self.model, self.optimizer)

    def train_step(self) -> float:
        self.optimizer.zero_grad()
        loss = self.model(torch.randn(6, 11)).square().sum()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def save(self, step: int, *, keep: int = 2, **state: Any) -> Path:
        state["optimizer"] = optimizer_state(self.optimizer)
        return save_checkpoint(self.folder, step, shards=self.shards, masks=self.masks, state=state, keep=keep)

    def load(self, path: Path) -> Checkpoint:
        ensure_moments(self.optimizer)
        checkpoint = load_checkpoint(path, shards=self.shards)
        load_optimizer_state(self.optimizer, checkpoint.state["optimizer"])
        return checkpoint


@pytest.fixture
def new_run(tmp_path: Path) -> type[Run]:
    """Makes runs that save into one folder."""

    class RunHere(Run):
        def __init__(self, **options: Any) -> None:
            super().__init__(tmp_path / "checkpoints", **options)

    return RunHere


@pytest.fixture
def run(new_run: type[Run]) -> Run:
    return new_run()
