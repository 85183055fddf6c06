"""Which weights are zero, and when: patterns, criteria, distributions, schedules and methods, exact over shards.

Read in this order: sparsifier (the whole), matching, schedules and windows (when), choose, distributions, keys and
selection (which), methods, zeroing; recipe_schedules and forward_masks (n:m recipes).
"""

from sparsetrain.sparsity.matching import Parameter, describe_parameters, match_rules
from sparsetrain.sparsity.schedules import Timetable
from sparsetrain.sparsity.sparsifier import LayerSparsity, Sparsifier
from sparsetrain.sparsity.windows import StepCosts, plan_timetables, planned_densities

__all__ = [
    "LayerSparsity",
    "Parameter",
    "Sparsifier",
    "StepCosts",
    "Timetable",
    "describe_parameters",
    "match_rules",
    "plan_timetables",
    "planned_densities",
]
