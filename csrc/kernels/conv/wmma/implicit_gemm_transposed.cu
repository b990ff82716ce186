#include "conv/wmma/implicit_gemm.cuh"

namespace unet_fast::gpu::wmma {

int LaunchGemmTransposed(void* stream, DType dtype, const GemmArgs& g, int tile) {
  return LaunchGemmTile</*kTransposed=*/true>(stream, dtype, g, tile);
}

}  // namespace unet_fast::gpu::wmma
