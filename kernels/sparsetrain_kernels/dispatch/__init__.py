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
from sparsetrain_kernels.dispatch.table import (
    DENSE,
    Choice,
    Problem,
    Table,
    TableError,
    load_table,
    own_table,
    shipped_table,
)
from sparsetrain_kernels.dispatch.tuning import Tuned, measure, tune

__all__ = [
    "DENSE",
    "OPERATIONS",
    "Choice",
    "Implementation",
    "Operation",
    "Problem",
    "Table",
    "TableError",
    "Tuned",
    "choices",
    "explain",
    "forget_choices",
    "hardware_name",
    "load_table",
    "measure",
    "own_table",
    "shipped_table",
    "table",
    "tune",
    "use_table",
]
