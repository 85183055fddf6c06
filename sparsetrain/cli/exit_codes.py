"""What the program ends with."""

OK = 0
BUG = 1
MISTAKE = 2
"""Something for the person to mend; also what typer takes for a wrong use of the command line."""
INTERRUPTED = 130
"""Ctrl-C, as shells have it."""
