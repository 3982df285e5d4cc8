"""A small world in which the whole trainer can be run and judged on two CPU cores.

Read in this order: `scenes` (the world: drawing, edits, prompts), `scoring` (exact), `make_dataset` (the world as
WebDataset shards), `build_encoders` (tiny VAE, T5 and CLIP in the released layout; the results are kept in
`encoders/`), `evaluate` (a trained run against rendered truth).
"""
