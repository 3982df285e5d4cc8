"""Starts processes on hosts and looks after them; knows nothing of training.

One host: torchrun.sh, which asks check_host.py first. Slurm: slurm/submit.py makes a submission, whose jobs run
slurm/train.sbatch, which runs torchrun.sh on each node. status.py and sweep.py read what runs wrote.
"""
