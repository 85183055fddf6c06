"""Run benchmark cases and print one table: `python kernels/bench/run.py [names...] [--quick] [--list]`."""

import argparse
import importlib
import os
import pkgutil
import sys
import traceback
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[0] = str(HERE.parent)  # the folder that holds the package `bench`, in place of the package itself

from bench import cases  # noqa: E402
from bench.machine import this_machine  # noqa: E402
from bench.registry import CASES, Bench, Case, Row, Unavailable  # noqa: E402
from bench.table import format_table, write_csv  # noqa: E402


def main() -> int:
    """Run the cases named on the command line, or all; 1 when one of them raised."""
    for module in pkgutil.iter_modules(cases.__path__):
        importlib.import_module(f"{cases.__name__}.{module.name}")
    arguments = _parse()
    if arguments.list:
        print("\n".join(f"{case.name:24}{case.title}" for case in CASES.values()))
        return 0
    machine = this_machine(arguments.device)
    torch.set_num_threads(arguments.threads or machine.num_cores)
    bench = Bench(arguments.quick, torch.get_num_threads(), arguments.device)
    print(f"{machine}; {bench.num_threads} threads")
    rows, failed = [], []
    for name in arguments.names:
        print(f"running {name}: {CASES[name].title}", file=sys.stderr, flush=True)
        found = _run(CASES[name], bench)
        if found is None:
            failed.append(name)
            continue
        rows += found
        if found and not arguments.quick:
            folder = arguments.output / machine.folder
            write_csv(folder / f"{name}.csv", found, machine, bench.num_threads)
            plots = CASES[name].plots
            for what, figure in (plots(found) if plots else {}).items():
                figure.savefig(folder / f"{name}_{what}.png", dpi=110, bbox_inches="tight")
    if rows:
        print(format_table(rows))
    if not arguments.quick:
        print(f"\nwritten to {arguments.output / machine.folder}")
    for name in failed:
        print(f"failed: {name}")
    return 1 if failed else 0


def _run(case: Case, bench: Bench) -> list[Row] | None:
    """The case's rows; none where it cannot run here, None where it raised."""
    try:
        return list(case.rows(bench))
    except Unavailable as reason:
        print(f"not measured: {case.name}: {reason}")
        return []
    except Exception:
        traceback.print_exc()
        return None


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help="cases to run (default: all); see --list")
    parser.add_argument("--quick", action="store_true", help="few repetitions, no CSV and no plots: does it run?")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="what to measure on (default: cpu)")
    parser.add_argument("--list", action="store_true", help="say which cases there are")
    parser.add_argument("--threads", type=int, default=0, help="threads for torch (default: all cores)")
    parser.add_argument("--output", type=Path, default=HERE / "results", help="folder for CSVs (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")
    here = [name for name, case in CASES.items() if arguments.device in case.devices]
    unknown = sorted(set(arguments.names) - set(here))
    if unknown:
        parser.error(f"no case for {arguments.device} is called {', '.join(unknown)}; there are {', '.join(here)}")
    arguments.names = arguments.names or here
    return arguments


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
