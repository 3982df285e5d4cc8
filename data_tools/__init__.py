"""Offline jobs on data: one module is one command, `python -m data_tools.NAME --help`. Nothing imports this package.

Read `make_shards` (images and a table become shards) first, then `index_shards` (shards become an index), then
`encode_shards` (images and prompts become latents and text tokens). The format they write is in docs/data_format.md.
"""
