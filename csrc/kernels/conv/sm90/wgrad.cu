#include "conv/sm90/wgrad_strips.cuh"

#include <utility>

#include "conv/sm90/engine.h"
#include "conv/sm90/launch.h"
#include "conv/sm90/tensor_map.h"

namespace unet_fast::gpu::sm90 {
namespace {

template <typename T, typename S>
int LaunchWgrad(void* stream, const WgradKernelArgs& g, int units, int splits) {
  const dim3 grid(static_cast<unsigned>(CeilDiv(units, S::kTilesA) * g.tiles_n), splits);
  return Launch(WgradKernel<T, S>, grid, kWgradThreads, S::kSharedBytes, stream, g);
}

// What TMA walks over row by row, image by image, walked over image by image, row by row; and then some images that are
// not there, which fill the last strip.
PixelMap SideBySide(PixelMap map) {
  std::swap(map.h, map.n), std::swap(map.row_stride, map.image_stride);
  map.first_row = 0, map.row_step = 1, map.rows = map.h + static_cast<int>(CeilDiv(map.box, map.cols));
  return map;
}

template <typename T>
int LaunchStrips(void* stream, const WgradKernelArgs& g, int units, int splits) {
  const dim3 grid(static_cast<unsigned>(units / 3 * g.tiles_n), splits);
  const auto kernel = g.row_step == 2 ? WgradStripsKernel<T, 2> : WgradStripsKernel<T, 1>;
  return Launch(kernel, grid, kWgradThreads, strips::kSharedBytes, stream, g);
}

}  // namespace

int Wgrad(void* stream, DType dtype, const WgradArgs& g, const WgradPlan& plan, float* bias_slabs) {
  const WgradConfig& c = kWgradConfigs[plan.config];
  const int cols = g.out_w + c.share - 1;
  const FirstTap first = First(&g.taps, 1);
  const PixelWalk walk = {first, g.stride, cols, InPairs(g.source, g.sources, g.source_w, g.stride, first)};
  WgradKernelArgs k = {};
  for (int s = 0; s < g.sources; ++s) {
    const GemmSource& source = g.source[s];
    k.channels[s] = k.second[s] = source.channels, k.chunks[s] = static_cast<int>(CeilDiv(source.channels, 64));
    const PixelMap map = Pixels(source, g.source_h, g.source_w, g.batch, walk, g.out_h, 64 + c.share - 1);
    k.first_row = map.first_row, k.first_col = map.first_col, k.row_step = map.row_step, k.col_step = map.col_step;
    UNET_FAST_CUDA_RETURN_IF_ERROR(Encode(c.strips ? SideBySide(map) : map, dtype, &k.source[s]));
  }
  const GemmSource results = {g.dz, static_cast<int64_t>(g.out_h) * g.out_w * g.n, g.out_w * g.n, g.n};
  const PixelMap dz = Pixels(results, g.out_h, g.out_w, g.batch, {{0, 0}, 1, cols, false}, g.out_h, 64);
  UNET_FAST_CUDA_RETURN_IF_ERROR(Encode(c.strips ? SideBySide(dz) : dz, dtype, &k.dz));
  k.groups = Group(g.taps, c.share, walk, k.group);
  k.positions_per_image = Divisor(static_cast<int64_t>(g.out_h) * cols), k.positions_per_row = Divisor(cols);
  k.n = g.n, k.rows = g.out_h, k.tiles_n = static_cast<int>(CeilDiv(g.n, c.n));
  k.steps = plan.steps, k.steps_per_split = plan.steps_per_split;
  k.dweights = g.dweights, k.slabs = g.slabs, k.bias_slabs = bias_slabs;
  const int units = k.groups * (k.chunks[0] + k.chunks[1]);
  return Dispatch16(dtype, [&](auto type) -> int {
    using T = decltype(type);
    switch (plan.config) {  // in the order of kWgradConfigs
      case 0:
        return LaunchWgrad<T, WgradShape<3, 64, 3, 6>>(stream, k, units, plan.splits);
      case 1:
        return LaunchWgrad<T, WgradShape<2, 128, 3, 6>>(stream, k, units, plan.splits);
      case 2:
        return LaunchWgrad<T, WgradShape<1, 128, 3, 8>>(stream, k, units, plan.splits);
      case 3:
        return LaunchWgrad<T, WgradShape<2, 128, 1, 3>>(stream, k, units, plan.splits);
      case 4:
        return LaunchWgrad<T, WgradShape<1, 128, 1, 5>>(stream, k, units, plan.splits);
      default:
        return LaunchStrips<T>(stream, k, units, plan.splits);
    }
  });
}

}  // namespace unet_fast::gpu::sm90
