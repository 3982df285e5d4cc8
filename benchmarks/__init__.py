"""One command each, `python -m benchmarks.NAME --help`, that prints a table. Nothing imports this package."""
