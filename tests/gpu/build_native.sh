#!/usr/bin/env bash
# Builds the GPU kernels alone as a Python module _gpu_kernels, on a machine with nvcc and pybind11 but no TensorFlow:
#   bash tests/gpu/build_native.sh build/gpu && PYTHONPATH=build/gpu python3 -m pytest --noconftest tests/gpu/test_kernels.py
# The first argument is the folder to build in; UNET_FAST_CUDA_ARCH the architecture (90a), PYTHON the interpreter.
# Objects that are newer than every source are kept.
#
# The cudnn engine is built where cuDNN's and its frontend's headers are: in TF_INCLUDE, the folder tensorflow/include of
# the TensorFlow wheel, which is looked for where the variable is not set; or where its objects are, brought from a
# machine that has the headers. When the module runs, it opens the cuDNN of PyTorch's packages, or the loader's.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:?expected the folder to build in}
arch=${UNET_FAST_CUDA_ARCH:-90a}
python=${PYTHON:-python3}
mkdir -p "$out"

newest=$(find csrc/kernels csrc/python -type f -printf '%T@ %p\n' | sort -n | tail -1 | cut -d' ' -f2-)
folder_of() {  # of a Python module, which may be a folder alone, without importing it
  "$python" -c "import importlib.util as u; s = u.find_spec('$1'); print(next(iter(s.submodule_search_locations), ''))" \
    2>/dev/null || true
}
folders=(csrc/kernels/common/side_stream.cu csrc/kernels/conv/*.cu csrc/kernels/conv/wmma csrc/kernels/pool csrc/kernels/loss csrc/kernels/cast)
flags="-std=c++17 -O3 -Icsrc/kernels -gencode arch=compute_$arch,code=sm_$arch -Xcompiler -fPIC -DUNET_FAST_FINGERPRINT='\"kernels\"'"
if [[ "$arch" == 90a ]]; then
  folders+=(csrc/kernels/conv/sm90)
  flags+=" -DUNET_FAST_SM90"
fi
headers=${TF_INCLUDE:-$(folder_of tensorflow)/include}
plan="$out/csrc_kernels_conv_cudnn_plan.cc.o"
if [[ -f "$headers/third_party/gpus/cudnn/include/cudnn.h" ]]; then
  mkdir -p "$out/include/third_party/gpus"
  ln -sfn "$headers/third_party/gpus/cudnn/include" "$out/include/third_party/gpus/cudnn"
  [[ "$plan" -nt "$newest" ]] || rm -f "$out"/*.o  # some may have been compiled without the cudnn engine
elif [[ ! "$plan" -nt "$newest" ]]; then
  headers=
fi
if [[ "$headers" ]]; then
  folders+=(csrc/kernels/conv/cudnn)
  # Hidden, because PyTorch has functions of the frontend too, of another version.
  flags+=" -DUNET_FAST_CUDNN -isystem $out/include -isystem $headers/external/cudnn_frontend_archive/include"
  flags+=" -Xcompiler -fvisibility=hidden -Xcompiler -fvisibility-inlines-hidden"
fi
sources=(csrc/kernels/conv/problem.cc $(find "${folders[@]}" -name '*.cu' -o -name 'config.cc' -o -name 'plan.cc'))
objects=()
stale=()
for source in "${sources[@]}"; do
  object="$out/${source//\//_}.o"
  objects+=("$object")
  [[ "$object" -nt "$newest" ]] || stale+=("$source")
done
if [[ ${#stale[@]} -gt 0 ]]; then
  printf '%s\n' "${stale[@]}" | xargs -P "$(nproc)" -I{} sh -c \
    "nvcc $flags -c {} -o $out/\$(echo {} | tr / _).o"
fi
[[ "${OBJECTS_ONLY:-}" ]] && exit
includes=$("$python" -m pybind11 --includes)
suffix=$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
nvcc -O2 $flags -Xcompiler -fvisibility=hidden -shared -cudart static -DUNET_FAST_GPU_KERNELS_MODULE $includes \
  -Xlinker -rpath,"$(folder_of nvidia.cudnn)/lib" csrc/python/gpu_kernels.cc "${objects[@]}" \
  -o "$out/_gpu_kernels$suffix"
