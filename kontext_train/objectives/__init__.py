"""One file a training stage. `base.py` says what the loop asks of each; `build.py` picks by config."""
