# For --env: Pyxis and Enroot. srun starts each node's torchrun in the image; the job script itself runs on the host.
# The image must hold this project's dependencies; its code comes from the submission. Mounted must be: the folder that was
# submitted from, run.dir (SUBMISSION lies in it), shards, weights and encoders.
SRUN=(
  --container-image="$HOME/images/kontext_train.sqsh"
  --container-mounts="$PWD,${SUBMISSION%/launch/*},/data"
  --container-workdir="$PWD"
)
PYTHON=python3
