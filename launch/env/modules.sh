# For --env: software by Lmod or Environment Modules, and a virtual environment on a file system that all nodes see.
module purge
module load cuda/12.8
PYTHON=$HOME/venvs/kontext_train/bin/python
