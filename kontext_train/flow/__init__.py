"""Rectified-flow mathematics on plain tensors. Knows no model, no data, no processes.

One convention for time everywhere: t in [0, 1] float32, t = 0 is data, t = 1 is noise. Never rescaled here.
"""
