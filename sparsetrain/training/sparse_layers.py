"""What becomes of the zeros of a phase: which kernels leave them out, and what that spares."""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from sparsetrain_kernels.dispatch import DENSE, OPERATIONS, Choice
from sparsetrain_kernels.nm_linear import NMPattern
from torch import nn

from sparsetrain.config import RunConfig, SparsityRule
from sparsetrain.models import SparseLinear
from sparsetrain.models.sparse_linear import KernelPattern, choices, kernel_pattern, pattern_text
from sparsetrain.sharding import PartOfModel, canonical_modules, whole_model
from sparsetrain.sparsity import LayerSparsity, Sparsifier
from sparsetrain.training.summary import SparseLayerSummary


@dataclass(frozen=True)
class _Layer:
    """One that leaves out zeros where a kernel is faster than dense."""

    sparsity: LayerSparsity
    pattern: str
    shape: tuple[int, int]
    choices: Sequence[Choice]
    """For output, input gradient and weight gradient."""

    @property
    def skipped_share(self) -> float:
        """Share of its dense FLOPs that kernels leave out."""
        sparse = sum(choice.implementation != DENSE for choice in self.choices)
        return sparse / len(self.choices) * (1.0 - self.sparsity.density)


class SparseLayers:
    """The weights of one phase that rules multiply as zero in a pattern of kernels.

    Args:
        model: Plain, wrapped, sharded, or one rank's part of it: layers of other ranks count as well.
        sparsifier: The phase's, attached.
        config: Precision and micro-batch.
        seq_len: Tokens of a sample.
        device: cpu or cuda.
    """

    def __init__(
        self, model: nn.Module, sparsifier: Sparsifier, config: RunConfig, *, seq_len: int, device: str
    ) -> None:
        self._sparsifier = sparsifier
        self._part = model if isinstance(model, PartOfModel) else None
        modules = canonical_modules(whole_model(model))
        self._linears = {f"{path}.weight": module for path, module in modules if isinstance(module, SparseLinear)}
        self._num_tokens = config.train.micro_batch_size * seq_len
        self._dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        self._device = device

    def summaries(self) -> list[dict[str, Any]]:
        """`SparseLayerSummary`s as plain values, one for layers that are alike."""
        alike: dict[tuple[Any, ...], list[_Layer]] = defaultdict(list)
        for layer in self._layers():
            implementations = tuple(choice.implementation for choice in layer.choices)
            alike[_without_numbers(layer.sparsity.name), layer.shape, layer.pattern, implementations].append(layer)
        return [asdict(_summary(name, layers)) for (name, *_), layers in alike.items()]

    def skipped_flops_per_token(self) -> float:
        """FLOPs of forward and backward pass that kernels leave out at the densities of now."""
        return sum(6.0 * layer.sparsity.numel * layer.skipped_share for layer in self._layers())

    def notices(self) -> list[str]:
        """What runs masked dense although its rule names a pattern that kernels are written for."""
        dense: dict[tuple[str, str], list[str]] = defaultdict(list)
        where = f"in {str(self._dtype).removeprefix('torch.')} on {self._device}"
        for layer in self._layers():
            if self._rule(layer.sparsity).method == "bdwp":
                dense[layer.pattern, "no kernel multiplies with the two masks of bdwp"].append(layer.sparsity.name)
            elif not any(OPERATIONS[choice.problem.operation].candidates(choice.problem) for choice in layer.choices):
                dense[layer.pattern, f"no kernel computes it {where}"].append(layer.sparsity.name)
        for owned, pattern in self._owned():
            if owned.name not in self._linears:
                dense[pattern_text(pattern), "only nn.Linear layers leave out zeros"].append(owned.name)
        return [
            f"pattern {pattern}: {why}; masked dense, so that zeros save no time: {names[0]}"
            + (f" and {len(names) - 1} more" if names[1:] else "")
            for (pattern, why), names in dense.items()
        ]

    def _rule(self, owned: LayerSparsity) -> SparsityRule:
        return self._sparsifier.rules[owned.rule]

    def _owned(self) -> Iterator[tuple[LayerSparsity, KernelPattern]]:
        """Weights that are multiplied as zeros in a pattern that kernels are written for."""
        for owned in self._sparsifier.report():
            pattern = kernel_pattern(self._rule(owned).pattern)
            if pattern is not None:
                yield owned, pattern

    def _layers(self) -> Iterator[_Layer]:
        for owned, pattern in self._owned():
            linear = self._linears.get(owned.name)
            if linear is not None:
                shape = linear.out_features, linear.in_features
                yield _Layer(owned, pattern_text(pattern), shape, self._choices(owned, pattern, linear))

    def _choices(self, owned: LayerSparsity, pattern: KernelPattern, linear: SparseLinear) -> list[Choice]:
        shape = linear.out_features, linear.in_features
        if self._part is not None:
            rows, columns = self._part.multiplied_part(owned.name, torch.empty(shape, device="meta")).shape
            shape = rows, columns
        rule, density = self._rule(owned), owned.density
        if isinstance(pattern, NMPattern) and rule.is_recipe and density < 1.0:  # sdgf comes down to it in stages
            pattern = replace(pattern, n=round(density * pattern.m))
        how = (pattern, shape, density, self._num_tokens, self._dtype, self._device)
        chosen = choices(*how, transposable=rule.method == "transposable")
        if linear.is_beside_tokens_last:
            so_stored = choices(*how, tokens_last=True)
            chosen = [replace(b, dense_seconds=a.dense_seconds) for a, b in zip(chosen, so_stored, strict=True)]
        if not rule.is_recipe:
            return chosen
        if density == 1.0 or rule.method == "bdwp":
            return [_dense(choice) for choice in chosen]
        densities = self._sparsifier.weight_gradient_densities()
        return [*chosen[:2], _dense(chosen[2]) if densities[owned.name] == 1.0 else chosen[2]]


def _dense(choice: Choice) -> Choice:
    return replace(choice, implementation=DENSE, seconds=choice.dense_seconds, reason="it is needed whole")


def _summary(name: str, layers: Sequence[_Layer]) -> SparseLayerSummary:
    first = layers[0]
    names = [choice.implementation for choice in first.choices]
    return SparseLayerSummary(
        weights=name,
        count=len(layers),
        shape=first.shape,
        pattern=first.pattern,
        density=sum(layer.sparsity.density for layer in layers) / len(layers),
        implementation=names[0] if len(set(names)) == 1 else ", ".join(names),
        dense_seconds=_sum(choice.dense_seconds for choice in first.choices),
        sparse_seconds=_sum(choice.seconds for choice in first.choices),
        flops_skipped=sum(layer.skipped_share for layer in layers) / len(layers),
    )


def _sum(seconds: Iterator[float | None]) -> float | None:
    """None where one of them was not measured."""
    known = list(seconds)
    return None if None in known else sum(filter(None, known))


def _without_numbers(name: str) -> str:
    """`layers.*.ffn.up.weight` of layers.3.ffn.up.weight."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
