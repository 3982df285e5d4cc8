#!/usr/bin/env bash
# Collects what the device machine (Python 3.12, x86-64) lacks, for a checkout that travels there without a network:
#   .whl/      small wheels, in one folder
#   .whl-libs/ nvidia-cutlass-dsl-libs-cu13, too large for one call, in two parts
# Both are ignored by git. README.md beside this file says how to carry and install them.
set -euo pipefail
cd "$(dirname "$0")/../.."
rm -rf .whl .whl-libs
mkdir -p .whl .whl-libs

platforms=()
for name in 2_28_x86_64 2_27_x86_64 2_24_x86_64 2_17_x86_64 2014_x86_64 1_x86_64; do
  [[ $name == 2_* ]] && platforms+=(--platform "manylinux_$name") || platforms+=(--platform "manylinux$name")
done
wheels() { # folder, packages...
  python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    "${platforms[@]}" -c constraints.txt -d "$@"
}

# The package's own: configuration, data, float8, and diffusers to compare with. wandb is not needed to import it.
wheels .whl hydra-core omegaconf webdataset braceexpand diffusers importlib_metadata torchao
python3 -m pip wheel -q --no-deps -c constraints.txt -w .whl antlr4-python3-runtime==4.9.3 # released as source only

# FlashAttention-4 and its compiler. Versions that name each other exactly are given exactly.
dsl=4.8.1
wheels .whl flash-attn-4==4.0.0b36 quack-kernels==0.6.5 apache-tvm-ffi torch-c-dlpack-ext \
  "nvidia-cutlass-dsl==$dsl" "nvidia-cutlass-dsl-libs-base==$dsl" "nvidia-cutlass-dsl-libs-core==$dsl"
wheels .whl-libs "nvidia-cutlass-dsl-libs-cu13==$dsl"
libs=(.whl-libs/*.whl)
split -b 60000000 "${libs[0]}" "${libs[0]}.part-"
rm "${libs[0]}"

du -sh .whl .whl-libs/*
