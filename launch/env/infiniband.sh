# For --env: nodes joined by InfiniBand (or RoCE), names as on many HGX machines. Adapt them: `ibdev2netdev`, `ip -br addr`.
export NCCL_IB_HCA=mlx5          # devices whose names begin so carry the data; ^mlx5_2 leaves one out
export NCCL_SOCKET_IFNAME=^lo,docker   # for meeting only; all interfaces but these
export NCCL_IB_TIMEOUT=22        # 4.096 us x 2^22: 17 s until a lost packet counts, so that a flapping link is survived
# RoCE only: export NCCL_IB_GID_INDEX=3
# A node's ulimit -l must be unlimited, or check_host.py stops the job: set LimitMEMLOCK=infinity in slurmd's unit.
