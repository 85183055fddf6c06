"""`python -m sparsetrain`."""

from sparsetrain.cli import main

main()
