"""Batches of a prepared corpus: any batch of the training order at once, and the held-out samples."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparsetrain.data.order import SampleOrder
from sparsetrain.data.stream import TokenStream
from sparsetrain.data.tokenizer import Tokenizer

NOT_COUNTED = -100
"""Target of a position that has none; the value that torch's cross-entropy ignores."""


@dataclass(frozen=True)
class Batch:
    """B samples of T tokens."""

    tokens: Tensor
    """int64 [B, T]: inputs."""
    targets: Tensor
    """int64 [B, T]: the token after each input; `NOT_COUNTED` where there is none."""
    document_ids: Tensor
    """int32 [B, T]: which document of its sample a token belongs to, counted from 0."""
    sample_ids: Tensor
    """int64 [B]: which sample of the corpus this is, the same in every epoch; -1 for a row of padding."""

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on a device; from pinned memory the copy does not block."""
        return Batch(
            self.tokens.to(device, non_blocking=True),
            self.targets.to(device, non_blocking=True),
            self.document_ids.to(device, non_blocking=True),
            self.sample_ids.to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class SourceStreams:
    """One source of the mixture, divided into what is trained on and what is held out."""

    label: str
    weight: float
    train: TokenStream
    held_out: TokenStream


class Dataset:
    """A mixture of tokenized sources; made by `prepare`.

    Attributes:
        tokenizer: Turns text into the ids of `Batch.tokens` and back.
        seq_len: Tokens a sample, T.
        num_train_tokens: Tokens to train on, all sources together.
        num_train_samples: Samples to train on, all sources together: an epoch, where the weights are in proportion.
        num_eval_tokens: Held-out tokens.
        num_eval_samples: Held-out samples, the last of a source possibly shorter than T.
        provenance: What the corpus is made of, for the run folder: JSON-able.
        notices: What a person should be told once.
    """

    def __init__(
        self,
        sources: Sequence[SourceStreams],
        tokenizer: Tokenizer,
        *,
        seq_len: int,
        seed: int,
        bytes_per_token: float | None,
        provenance: Mapping[str, Any],
        notices: Sequence[str],
    ) -> None:
        self.sources = tuple(sources)
        self.tokenizer = tokenizer
        self.seq_len = seq_len
        self.provenance = dict(provenance)
        self.notices = tuple(notices)
        self.order = SampleOrder(
            [source.train.num_samples for source in sources], [source.weight for source in sources], seed
        )
        self.num_train_tokens = sum(source.train.num_tokens for source in sources)
        self.num_train_samples = sum(source.train.num_samples for source in sources)
        self.num_eval_tokens = sum(source.held_out.num_tokens for source in sources)
        train_sizes = [source.train.num_samples for source in sources]
        eval_sizes = [-(-max(0, source.held_out.num_tokens - 1) // seq_len) for source in sources]
        self.num_eval_samples = sum(eval_sizes)
        self._train_offsets = np.cumsum([0, *train_sizes])
        self._eval_offsets = np.cumsum([0, *eval_sizes])
        self._token_bytes = tokenizer.token_bytes
        self._bytes_per_token = bytes_per_token

    def batch(self, first: int, count: int) -> Batch:
        """Training samples by global index: `first` … `first + count` − 1 of an endless order.

        The order is a function of the seed and the index alone. A source that has been read through begins again in a
        new order.

        Returns:
            A batch with B = count.

        Raises:
            DataError: A shard holds a token that the tokenizer does not have.
        """
        draw = self.order.draw(first, count)
        streams = [source.train for source in self.sources]
        reads = [(streams[source], int(sample)) for source, sample in zip(draw.source, draw.sample, strict=True)]
        return self._read(reads, self._train_offsets[draw.source] + draw.sample, count)

    def eval_batches(self, batch_size: int, max_tokens: int, *, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """Held-out samples, each on exactly one rank, the same ones at every world size.

        Every rank gets equally many batches of equal size, so that ranks which shard the model stay in step: rows
        without a sample are padding (`sample_ids` -1, all targets `NOT_COUNTED`).

        Args:
            batch_size: Rows of a batch, at most.
            max_tokens: Read about so many tokens at most, evenly spread over all held-out ones; at least one sample.
            rank: This rank.
            world_size: Ranks that share the work.
        """
        num_samples = min(self.num_eval_samples, max(1, max_tokens // self.seq_len))
        chosen = np.arange(num_samples) * self.num_eval_samples // max(1, num_samples)
        per_rank = -(-num_samples // world_size)
        rows = min(batch_size, per_rank)
        mine = chosen[rank::world_size]
        for first in range(0, per_rank, max(1, rows)):
            ids = mine[first : first + rows]
            sources = np.searchsorted(self._eval_offsets, ids, side="right") - 1
            samples = ids - self._eval_offsets[sources]
            streams = [source.held_out for source in self.sources]
            reads = [(streams[source], int(sample)) for source, sample in zip(sources, samples, strict=True)]
            yield self._read(reads, ids, rows)

    def target_bytes(self, batch: Batch) -> int:
        """Bytes of UTF-8 that the counted targets stand for; end-of-document stands for none.

        Exact for bytes and byte-level BPE. For other tokenizers the number of targets times the mean bytes a token of
        the held-out documents, rounded.
        """
        targets = batch.targets.cpu().numpy()
        targets = targets[targets != NOT_COUNTED]
        if self._token_bytes is not None:
            return int(self._token_bytes[targets].sum())
        assert self._bytes_per_token is not None
        return round(int(targets.size) * self._bytes_per_token)

    def _read(self, reads: Sequence[tuple[TokenStream, int]], sample_ids: NDArray[np.int64], rows: int) -> Batch:
        end = self.tokenizer.end_of_document
        tokens = np.full((rows, self.seq_len + 1), end, dtype=np.int64)
        document_starts = np.zeros((rows, self.seq_len + 1), dtype=np.int32)
        filled = np.zeros(rows, dtype=np.int64)
        for row, (stream, sample) in enumerate(reads):
            filled[row] = stream.read(sample, tokens[row], document_starts[row])
        targets = tokens[:, 1:].copy()
        if filled.min(initial=self.seq_len + 1) <= self.seq_len:
            targets[np.arange(1, self.seq_len + 1) >= filled[:, None]] = NOT_COUNTED
        ids = np.full(rows, -1, dtype=np.int64)
        ids[: len(reads)] = sample_ids
        return Batch(
            torch.from_numpy(tokens[:, :-1].copy()),
            torch.from_numpy(targets),
            torch.from_numpy(document_starts[:, :-1].cumsum(axis=1, dtype=np.int32)),
            torch.from_numpy(ids),
        )
