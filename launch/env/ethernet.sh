# For --env: nodes joined by Ethernet without RDMA. Adapt the name: `ip -br addr`.
export NCCL_IB_DISABLE=1
export NCCL_SOCKET_IFNAME=eth0   # of the fast network; the same interface carries gloo
export GLOO_SOCKET_IFNAME=eth0
export NCCL_SOCKET_NTHREADS=4 NCCL_NSOCKS_PERTHREAD=4   # one socket does not fill 100 Gbit/s
