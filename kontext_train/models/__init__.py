"""The network and its encoders. A model never learns that it is sharded, and knows nothing of data or objectives.

Read `sequence.py` (how samples share one packed sequence), then `flux.py` (the transformer), then `kontext.py` (what
the rest of the package calls). `weights.py` reads and writes released files.
"""
