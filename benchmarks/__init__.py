"""One command each, `python -m benchmarks.NAME --help`, that prints a table. Nothing but tests imports this package."""
