// Launcher of the implicit GEMM: limits, tile, layout of the weights.
#include <algorithm>

#include "conv/wmma/engine.h"
#include "conv/wmma/implicit_gemm.cuh"

namespace unet_fast::gpu::wmma {

int ImplicitGemm(void* stream, DType dtype, GemmArgs g, int forced_tile) {
  const int64_t rows = CeilDiv(g.out_h, 2), cols = CeilDiv(g.out_w, 2), m = 4 * g.batch * rows * cols;
  g.quads_per_image = Divisor(rows * cols);
  g.quads_per_row = Divisor(cols);
  if (m >= int64_t{1} << 31) return cudaErrorNotSupported;
  for (int s = 0; s < g.sources; ++s) {
    if (g.source[s].image_stride >= int64_t{1} << 31) return cudaErrorNotSupported;
  }
  for (int list = 0; list < g.lists; ++list) {
    TapList& taps = g.taps[list];
    for (int t = 0; t < taps.count; ++t) {
      const int64_t offset = taps.tap[t].index * g.tap_stride;
      if (offset + g.tap_stride >= int64_t{1} << 31) return cudaErrorNotSupported;
      taps.weight_offset[t] = static_cast<int>(offset);
      const int row = taps.tap[t].row, col = taps.tap[t].col;
      taps.first_row = std::min(taps.first_row, row), taps.last_row = std::max(taps.last_row, row);
      taps.first_col = std::min(taps.first_col, col), taps.last_col = std::max(taps.last_col, col);
      for (int s = 0; s < g.sources; ++s) {
        taps.source_offset[s][t] = row * g.source[s].row_stride + col * g.source[s].channels;
      }
    }
  }
  const int tile = ChooseGemmTile(m * g.lists, g.n, g.vector, forced_tile);
  return g.transposed ? LaunchGemmTransposed(stream, dtype, g, tile) : LaunchGemmPlain(stream, dtype, g, tile);
}

}  // namespace unet_fast::gpu::wmma
