"""What may not pass: rules read from a file, and the scorers that judge prompts and images by them.

`rules.py` is the policy as data (torch-free), `judge.py` applies it; `words.py`, `hashes.py`, `clip.py` and `heads.py`
are what it judges with, `provenance.py` what a picture says of itself. `data_tools.filter_safety` runs it over shards,
`kontext-sample gate=…` over one request. Page: docs/safety.md.
"""
