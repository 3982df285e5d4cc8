"""What is measured on images. One file a family; `build.py` loads those that are asked for, each from a local folder.

A metric has `numbers` (and whether more is better), says in `about` which model of which version it is, and measures
one image at a time (`Metric`) or a set of them (`SetMetric`). What a number needs and a case lacks (a mask, a second
caption) leaves the number out; what goes wrong is a ValueError, which is counted under the image's name.
"""
