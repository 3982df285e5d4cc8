"""Runs as Slurm jobs. Read submission.py, then submit.py (what a user calls), then train.sbatch (what Slurm calls)."""
