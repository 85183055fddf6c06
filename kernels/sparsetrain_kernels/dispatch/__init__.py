"""Which implementation runs a call: chosen from times measured on this hardware, dense where none is faster.

`explain` says what is chosen for a problem and why; `tune` measures anew.
"""

from sparsetrain_kernels.dispatch.hardware import hardware_name
from sparsetrain_kernels.dispatch.operation import (
    OPERATIONS,
    Implementation,
    Operation,
    choices,
    explain,
    forget_choices,
    table,
    use_table,
)
from sparsetrain_kernels.dispatch.table import DENSE, Choice, Problem, Table, load_table, own_table
from sparsetrain_kernels.dispatch.tuning import measure, tune

__all__ = [
    "DENSE",
    "OPERATIONS",
    "Choice",
    "Implementation",
    "Operation",
    "Problem",
    "Table",
    "choices",
    "explain",
    "forget_choices",
    "hardware_name",
    "load_table",
    "measure",
    "own_table",
    "table",
    "tune",
    "use_table",
]
