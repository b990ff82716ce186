#include "conv/wmma/implicit_gemm.cuh"

namespace unet_fast::gpu::wmma {

int LaunchGemmPlain(void* stream, DType dtype, const GemmArgs& g, int tile) {
  return LaunchGemmTile</*kTransposed=*/false>(stream, dtype, g, tile);
}

}  // namespace unet_fast::gpu::wmma
