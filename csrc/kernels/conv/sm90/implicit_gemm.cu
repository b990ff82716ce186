#include "conv/sm90/engine.h"
#include "conv/sm90/launch.h"
#include "conv/sm90/tensor_map.h"

namespace unet_fast::gpu::sm90 {

int ImplicitGemm(void* stream, DType dtype, const GemmArgs& g, int config) {
  const GemmConfig& c = kGemmConfigs[config];
  if (c.stationary > 0) return c.share == 3 ? StationaryGemm(stream, dtype, g) : Upsample(stream, dtype, g);
  const int rows = c.pairs ? (g.out_h + 1) / 2 : g.out_h;
  // The walk over a row: with the columns beyond it that neighbouring taps read; with an even number of positions where
  // windows of two must not fall apart.
  int cols = g.out_w + c.share - 1;
  if (c.pairs) cols += cols % 2;
  const FirstTap first = First(g.taps, g.lists);
  const PixelWalk walk = {first, g.stride, cols, InPairs(g.source, g.sources, g.source_w, g.stride, first)};
  KernelArgs k = {};
  int channels = 0;
  for (int s = 0; s < g.sources; ++s) {
    const GemmSource& source = g.source[s];
    k.chunks[s] = static_cast<int>(CeilDiv(source.channels, 64));
    k.first_channel[s] = channels, k.second[s] = source.channels;
    channels += source.channels;
    for (int odd = 0; odd < (c.pairs ? 2 : 1); ++odd) {
      PixelMap map = Pixels(source, g.source_h, g.source_w, g.batch, walk, rows, c.warp_m + c.share - 1);
      k.first_row = map.first_row, k.first_col = map.first_col, k.row_step = map.row_step, k.col_step = map.col_step;
      if (c.pairs) {
        map.data = At(source.data, dtype, odd * static_cast<int64_t>(source.row_stride));
        map.h = (g.source_h - odd + 1) / 2, map.row_stride *= 2, map.first_row = first.row >> 1;
      }
      if (map.h == 0) continue;  // an image of one row has no odd ones, and no window either
      UNET_FAST_CUDA_RETURN_IF_ERROR(Encode(map, dtype, &k.source[s][odd]));
    }
  }
  int taps = 0;
  for (int l = 0; l < g.lists; ++l) {
    k.groups[l] = Group(g.taps[l], c.share, walk, k.group[l]);
    k.result_offset[l] = g.taps[l].result_offset;
    for (int t = 0; t < g.taps[l].count; ++t) taps = std::max(taps, g.taps[l].tap[t].index + 1);
  }
  const WeightMap weights = g.transposed ? WeightMap{g.weights, channels, g.n, taps, g.ld, g.tap_stride, c.n}
                                         : WeightMap{g.weights, g.n, channels, taps, g.ld, g.tap_stride, 64};
  UNET_FAST_CUDA_RETURN_IF_ERROR(Encode(weights, dtype, &k.weights));
  k.lists = g.lists;
  k.positions_per_image = Divisor(static_cast<int64_t>(rows) * cols), k.positions_per_row = Divisor(cols);
  k.batch = g.batch, k.out_h = g.out_h, k.out_w = g.out_w, k.n = g.n;
  k.tiles_m = static_cast<int>(CeilDiv(static_cast<int64_t>(g.batch) * rows * cols, (c.pairs ? 1 : 2) * c.warp_m));
  k.tiles_n = static_cast<int>(CeilDiv(g.n, c.n)), k.tiles = k.tiles_m * k.tiles_n * g.lists;
  k.splits = c.splits;
  k.result[0] = g.result[0], k.result[1] = g.result[1];
  k.mask_image_stride = g.mask_image_stride, k.mask_row_stride = g.mask_row_stride;
  k.split = g.results == 2 ? g.result[0].channels : g.n;
  k.bias = g.bias, k.relu = g.relu, k.pooled = g.pooled;
  return dtype == DType::kFloat16 ? LaunchFloat16(stream, k, config, g.transposed)
                                  : LaunchBFloat16(stream, k, config, g.transposed);
}

}  // namespace unet_fast::gpu::sm90
