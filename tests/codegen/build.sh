#!/bin/sh
# usage: sh build.sh PYTHON
# Compiles the two stubs into build/ beside this script, with the CUDA headers that pip installed beside PYTHON's torch.
set -eu
[ $# -eq 1 ] || { echo "usage: sh build.sh PYTHON (of the environment that has torch)" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)

torch=$("$1" -c 'from importlib.util import find_spec as find; t = find("torch"); print(t.origin if t else "")')
[ -n "$torch" ] || { echo "$1 has no torch" >&2; exit 1; }
packages=$(dirname "$(dirname "$torch")")
# nvidia/cu13/include; nvidia/cuda_runtime/include before CUDA 13. It must be of torch's CUDA version: the layout of
# cudaDeviceProp changes. Triton's copy is older, and only lends crt/host_defines.h, which torch's packages leave out.
headers=
for header in "$packages"/nvidia/*/include/cuda_runtime_api.h; do
    [ ! -f "$header" ] || headers=$(dirname "$header")
done
[ -n "$headers" ] || { echo "$packages has no nvidia/*/include/cuda_runtime_api.h: is torch a CUDA build?" >&2; exit 1; }

command -v gcc >/dev/null || { echo "gcc is missing" >&2; exit 1; }

mkdir -p "$here/build"
gcc -O1 -fPIC -shared -isystem "$headers" -isystem "$packages/triton/backends/nvidia/include" \
    -o "$here/build/cudart.so" "$here/stubs/cudart.c"
gcc -O1 -fPIC -shared -Wl,-soname,libcuda.so.1 -o "$here/build/libcuda.so.1" "$here/stubs/cuda.c"
echo "built: build/cudart.so build/libcuda.so.1"
