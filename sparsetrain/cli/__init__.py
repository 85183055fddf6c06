"""The command line: `program` puts the commands together; each of them imports what it needs when it runs."""

from sparsetrain.cli.program import app, main

__all__ = ["app", "main"]
