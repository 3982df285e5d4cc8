"""Processes and sharding. Works on any module with `blocks()`; knows no model by name."""
