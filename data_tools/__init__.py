"""Offline jobs on data: one module is one command, `python -m data_tools.NAME --help`. Nothing imports this package.

Read `make_shards` (images and a table become shards) first, with `tables` (where rows come from) and `rows` (a row
becomes a sample), then `index_shards` (shards become an index), `check_shards` (what is in shards, and what is wrong
with it), `filter_shards` (fewer of them) and `encode_shards` (images and prompts become latents and text tokens).
`shard_writing` is how all of them write: so that they can be interrupted. The commands are explained in
docs/data_tools.md, the format in docs/data_format.md.
"""
