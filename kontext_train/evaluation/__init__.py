"""Judging what a run made: a trained model ready to generate (`trained.py`)."""
