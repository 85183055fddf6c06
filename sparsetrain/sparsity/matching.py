"""Which rule owns which weight: globs over parameter names, the first that matches wins.

Works on a model on the meta device, so that a rule that names nothing is found before any worker starts.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from math import prod

from torch import nn

from sparsetrain.config import InvalidConfig, Problem, SparsityRule
from sparsetrain.config.origin import KeyPath
from sparsetrain.sharding import DescribesWeights, canonical_modules, weight_modules, whole_model, whole_shape
from sparsetrain.sparsity.patterns import misfit

_HEADS = ("head", "lm_head")
_DENSE_MODULES = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)


@dataclass(frozen=True)
class Parameter:
    """What matching needs to know of one parameter."""

    name: str
    shape: tuple[int, ...]
    dense_by_default: bool
    """An embedding, a norm, a bias or the output head: owned only by a glob whose last part spells it out."""
    in_linear: bool = True
    """Whether it is the weight of an nn.Linear, and of nothing else."""
    aliases: tuple[str, ...] = ()
    """Further names of a shared parameter, for example head.weight of a model whose head is its embedding."""

    @property
    def numel(self) -> int:
        """Number of weights."""
        return prod(self.shape)


def describe_parameters(model: nn.Module) -> list[Parameter]:
    """Name, shape and kind of every parameter of any module, plain, wrapped or sharded, in the module's order.

    Of a module that is a part of a model, those of the whole.
    """
    model = whole_model(model)
    aliases = _aliases(model)
    described = []
    for path, owner, parameters in weight_modules(model):
        if isinstance(owner, DescribesWeights):
            described += [
                Parameter(name, shape, dense_by_default=len(shape) < 2, in_linear=False)
                for name, shape in owner.describe_weights(path).items()
            ]
        for name, parameter in parameters.items():
            names, owners = aliases[id(parameter)]
            shape = whole_shape(parameter)
            dense = (
                len(shape) < 2
                or any(isinstance(module, _DENSE_MODULES) for module in owners)
                or any(_last_part(alias) in _HEADS for alias in names)
            )
            others = tuple(alias for alias in names if alias != name)
            in_linear = all(isinstance(module, nn.Linear) for module in owners) and not others
            described.append(Parameter(name, shape, dense, in_linear, others))
    return described


def _aliases(model: nn.Module) -> dict[int, tuple[list[str], list[nn.Module]]]:
    """Every name of each parameter, and the modules that have it, by the parameter's id."""
    found: dict[int, tuple[list[str], list[nn.Module]]] = {}
    for path, module in canonical_modules(model):
        for leaf, parameter in module.named_parameters(recurse=False):
            names, owners = found.setdefault(id(parameter), ([], []))
            names.append(f"{path}.{leaf}" if path else leaf)
            owners.append(module)
    return found


def match_rules(
    rules: Sequence[SparsityRule], parameters: Iterable[Parameter], *, key: str = "sparsity"
) -> list[list[Parameter]]:
    """Give every parameter to the first rule with a glob that matches it.

    A glob matches a name as in a shell (`*` also crosses dots); the name's `.weight` may be left out. Embeddings,
    norms, biases (anything with fewer than two dimensions) and the head are matched only where the last part of the
    glob spells theirs: `*.bias`, `embed`, `*.lm_head.weight`; not `*` or `*norm*`.

    Args:
        rules: In order of precedence.
        parameters: From `describe_parameters`.
        key: Where the rules stand in the config, for messages: `train.phases.0.sparsity`.

    Returns:
        The parameters of each rule, sorted by name, which is the order in which ties between weights are broken.

    Raises:
        ConfigError: A glob matches nothing, a rule owns nothing, or a pattern does not fit a weight. All at once.
    """
    parameters = sorted(parameters, key=lambda parameter: parameter.name)
    owned: list[list[Parameter]] = [[] for _ in rules]
    for parameter in parameters:
        for rule, mine in zip(rules, owned, strict=True):
            if any(_owns(glob, parameter) for glob in rule.params):
                mine.append(parameter)
                break
    where = tuple(int(part) if part.isdecimal() else part for part in key.split("."))
    problems = [
        problem
        for at, (rule, mine) in enumerate(zip(rules, owned, strict=True))
        for problem in _problems(rule, (*where, at), mine, parameters)
    ]
    if problems:
        raise InvalidConfig(key, problems)
    return owned


def _problems(rule: SparsityRule, where: KeyPath, mine: list[Parameter], every: list[Parameter]) -> list[Problem]:
    """What is wrong with a rule that owns `mine` of the model's parameters."""
    problems = [
        Problem((*where, "params", place), _why_nothing(glob, every), value=glob)
        for place, glob in enumerate(rule.params)
        if not any(_owns(glob, parameter) for parameter in every)
    ]
    if not mine and not problems:
        message = "every weight that it matches belongs to an earlier rule; put this rule before it or remove it"
        problems.append(Problem((*where, "params"), message, value=list(rule.params)))
    foreign = [parameter.name for parameter in mine if rule.is_recipe and not parameter.in_linear]
    if foreign:
        message = f"needs nn.Linear layers, and {foreign[0]} is in none of its own; leave it to a static or prune rule"
        problems.append(Problem((*where, "method"), message, value=rule.method))
    misfits = list(filter(None, (misfit(rule, parameter.name, parameter.shape) for parameter in mine)))
    if misfits:
        others = f" ({len(misfits) - 1} other weights do not fit either)" if len(misfits) > 1 else ""
        problems.append(Problem((*where, "pattern"), misfits[0] + others, value=rule.pattern))
    return problems


def _owns(glob: str, parameter: Parameter) -> bool:
    return any(_matches(glob, name, parameter.dense_by_default) for name in (parameter.name, *parameter.aliases))


def _matches(glob: str, name: str, dense_by_default: bool) -> bool:
    if not (fnmatchcase(name, glob) or fnmatchcase(name.removesuffix(".weight"), glob)):
        return False
    return not dense_by_default or _last_part(glob) == _last_part(name)


def _last_part(name: str) -> str:
    """`norm` of layers.0.norm.weight, `bias` of layers.0.norm.bias."""
    return name.removesuffix(".weight").rsplit(".", 1)[-1]


def _why_nothing(glob: str, parameters: Sequence[Parameter]) -> str:
    names = [name for parameter in parameters for name in (parameter.name, *parameter.aliases)]
    spared = [name for name in names if _matches(glob, name, dense_by_default=False)]
    spared.sort(key=lambda name: not name.endswith(".weight"))
    if spared:
        return (
            f"matches only embeddings, norms, biases or the head (such as {spared[0]}), which stay dense "
            f"unless the glob's last part spells theirs: '*.{_last_part(spared[0])}'"
        )
    stems = {name.removesuffix(".weight"): name for name in names}
    near = get_close_matches(glob.removesuffix(".weight"), stems, n=1, cutoff=0.0)
    hint = f"; the nearest name is {stems[near[0]]}" if near else "; the model has no parameters"
    return f"matches no parameter{hint}"
