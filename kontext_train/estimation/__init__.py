"""What a run will need and how fast it can be, before it has a GPU. Read `estimate.py` first, then what it calls."""
