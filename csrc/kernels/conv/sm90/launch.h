// What the launchers of the sm90 kernels share: the walk over pixels, and taps in groups that share a load.
#pragma once

#include <algorithm>

#include "conv/sm90/engine.h"
#include "conv/sm90/implicit_gemm.cuh"
#include "conv/sm90/tensor_map.h"

namespace unet_fast::gpu::sm90 {

// What TMA walks over to read a source: as in PixelMap, `cols` positions a row from the first tap on.
struct PixelWalk {
  FirstTap first;
  int stride, cols;
  bool in_pairs;
};
inline PixelMap Pixels(const GemmSource& source, int h, int w, int batch, const PixelWalk& walk, int rows, int box) {
  const int pair = walk.in_pairs ? 2 : 1;
  return {source.data,
          source.channels * pair,
          w / pair,
          h,
          batch,
          source.row_stride,
          source.image_stride,
          walk.first.row,
          rows,
          walk.first.col / pair,
          walk.cols,
          walk.stride,
          walk.stride / pair,
          box};
}

// Groups of `share` taps, each from left to right; returns their number.
inline int Group(const TapList& taps, int share, const PixelWalk& walk, TapGroup* groups) {
  const int pair = walk.in_pairs ? 2 : 1;
  for (int t = 0; t < taps.count; t += share) {
    const bool leftwards = share == 3 && taps.tap[t].col > taps.tap[t + 2].col;
    TapGroup& group = groups[t / share];
    for (int i = 0; i < share; ++i) {
      const Tap& tap = taps.tap[leftwards ? t + share - 1 - i : t + i];
      group.weight[i] = static_cast<uint8_t>(tap.index);
      const int col = tap.col - walk.first.col;
      if (i == 0) {
        group.row = static_cast<uint8_t>(tap.row - walk.first.row), group.col = static_cast<uint8_t>(col / pair);
        group.second = static_cast<uint8_t>(col % pair);
      }
    }
  }
  return taps.count / share;
}

int LaunchFloat16(void* stream, const KernelArgs& args, int config, bool transposed);
int LaunchBFloat16(void* stream, const KernelArgs& args, int config, bool transposed);

template <typename T, typename S>
int LaunchShape(void* stream, const KernelArgs& g) {
  if constexpr (S::kSplit) {
    return LaunchClusters(ImplicitGemmKernel<T, S>, g.tiles * g.splits, g.splits, S::kThreads, S::kSharedBytes, stream,
                          g);
  }
  const int blocks = std::min(g.tiles, Multiprocessors() * S::kBlocks);
  return Launch(ImplicitGemmKernel<T, S>, blocks, S::kThreads, S::kSharedBytes, stream, g);
}

template <typename T, bool kTransposed>
int LaunchConfig(void* stream, const KernelArgs& g, int config) {
  switch (config) {  // in the order of kGemmConfigs
    case 0:
      return LaunchShape<T, Shape<128, 64, 3, false, kTransposed, 2, 3, 2>>(stream, g);
    case 1:
      if constexpr (!kTransposed) return LaunchShape<T, Shape<128, 64, 3, true, false, 2, 3, 2>>(stream, g);
      return cudaErrorNotSupported;
    case 2:
      return LaunchShape<T, Shape<64, 128, 3, false, kTransposed, 2, 3, 2>>(stream, g);
    case 3:
      return LaunchShape<T, Shape<128, 128, 3, false, kTransposed, 3, 6, 1>>(stream, g);
    case 4:
      if constexpr (!kTransposed) return LaunchShape<T, Shape<128, 128, 3, true, false, 3, 6, 1>>(stream, g);
      return cudaErrorNotSupported;
    case 5:
      return LaunchShape<T, Shape<64, 256, 3, false, kTransposed, 3, 4, 1>>(stream, g);
    case 6:
      return LaunchShape<T, Shape<128, 128, 1, false, kTransposed, 4, 4, 1>>(stream, g);
    case 7:
      return LaunchShape<T, Shape<64, 256, 1, false, kTransposed, 4, 4, 1>>(stream, g);
    case 8:
      return LaunchShape<T, Shape<128, 64, 1, false, kTransposed, 2, 3, 2>>(stream, g);
    case 12:
    case 13:
      return LaunchShape<T, Shape<128, 128, 3, false, kTransposed, 3, 6, 1, true>>(stream, g);
    case 14:
    case 15:
      if constexpr (!kTransposed) return LaunchShape<T, Shape<128, 128, 3, true, false, 3, 6, 1, true>>(stream, g);
      return cudaErrorNotSupported;
    case 16:
    case 17:
      return LaunchShape<T, Shape<128, 128, 1, false, kTransposed, 4, 4, 1, true>>(stream, g);
    case 19:
      if constexpr (!kTransposed) return LaunchShape<T, Shape<64, 128, 3, true, false, 2, 3, 2>>(stream, g);
      return cudaErrorNotSupported;
    case 20:
      return LaunchShape<T, Shape<64, 128, 3, false, kTransposed, 4, 8, 1, true>>(stream, g);
    case 21:
      return LaunchShape<T, Shape<64, 128, 1, false, kTransposed, 6, 6, 1, true>>(stream, g);
    default:  // those with weights in registers are launched elsewhere
      return cudaErrorNotSupported;
  }
}

}  // namespace unet_fast::gpu::sm90
