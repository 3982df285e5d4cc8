"""From tar shards to packed batches.

Read it in the order a batch travels: `shard.py` (what is in a tar file), `index.py` (where every sample's bytes are
and how big its images are; `index_file.py` is the file, `index_scan.py` its making by many processes), `storage.py`
(bytes of shards on disk; `remote.py` and `cache.py` of those elsewhere), `sources.py` and `order.py` (which samples a
window of the run holds), `packing.py` (samples to balanced packs), `plan.py` (which packs each rank takes at each step:
a pure function), `sample.py` (one sample), `transforms.py` (decode, resize, crop), `batch.py` (what a batch holds),
`loader.py` (worker processes in front of the device), `encode.py` (pixels and prompts to latents and text tokens, on
the device). `encoding.py` and `encoded.py` are about shards that hold latents already.
"""
