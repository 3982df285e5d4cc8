"""Offline jobs on data: one module is one command, `python -m data_tools.NAME --help`. Nothing imports this package.

Read `make_shards` (images and a table become shards) first, with `tables` (where rows come from) and `rows` (a row
becomes a sample), then `index_shards` (shards become an index), `check_shards` (what is in shards, and what is wrong
with it) and `filter_shards` (fewer of them). `shard_writing` is how all of them write: in parallel, and so that they
can be interrupted. The commands are explained in docs/data_tools.md, the format in docs/data_format.md.
"""
