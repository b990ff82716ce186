#include "conv/sm90/stationary.cuh"

#include "conv/sm90/engine.h"
#include "conv/sm90/launch.h"
#include "conv/sm90/tensor_map.h"
#include "conv/sm90/upsampling.cuh"

namespace unet_fast::gpu::sm90 {
namespace {

template <typename T, int kCols>
int LaunchStationary(void* stream, const StationaryArgs& k, bool transposed, Roles roles, bool pooled) {
  const auto launch = [&](auto kernel) -> int {
    const int blocks = std::min(k.tiles, Multiprocessors() / k.slices) * k.slices;
    return Launch(kernel, blocks, kStationaryThreads, stationary::kSharedBytes, stream, k);
  };
  if (pooled) {
    return roles == Roles::kChannels ? launch(StationaryKernel<T, false, Roles::kChannels, kCols, true>)
                                     : launch(StationaryKernel<T, false, Roles::kTiles, kCols, true>);
  }
  const auto with = [&](auto is_transposed) -> int {
    constexpr bool kTransposed = decltype(is_transposed)::value;
    if (roles == Roles::kResults) return launch(StationaryKernel<T, kTransposed, Roles::kResults, kCols, false>);
    if (roles == Roles::kChannels) return launch(StationaryKernel<T, kTransposed, Roles::kChannels, kCols, false>);
    return launch(StationaryKernel<T, kTransposed, Roles::kTiles, kCols, false>);
  };
  return transposed ? with(std::true_type()) : with(std::false_type());
}

// Of the strips that waste least the widest.
int StripColumns(int width, int least) {
  int cols = 64;
  for (int narrower = 56; narrower >= least; narrower -= 8) {
    if (CeilDiv(width, narrower) * narrower < CeilDiv(width, cols) * cols) cols = narrower;
  }
  return cols;
}

// Results, or what masks them: tiles of two rows.
ImageMap ResultMap(const GemmArgs& g, const GemmResult& result, int cols) {
  return {result.data, result.channels, g.out_w, g.out_h, g.batch, result.row_stride, result.image_stride, cols, 2};
}
ImageMap MaskMap(const GemmArgs& g, int index, int cols) {
  ImageMap map = ResultMap(g, g.result[index], cols);
  map.data = g.result[index].mask;
  if (index == 1) map.row_stride = g.mask_row_stride, map.image_stride = g.mask_image_stride;
  return map;
}

}  // namespace

int StationaryGemm(void* stream, DType dtype, const GemmArgs& g) {
  const FirstTap first = First(g.taps, 1);
  const int cols = StripColumns(g.out_w, 40);
  StationaryArgs k = {};
  k.first_row = first.row, k.first_col = first.col;
  int channels = 0;
  for (int s = 0; s < g.sources; ++s) {
    const GemmSource& source = g.source[s];
    const ImageMap map = {source.data,       source.channels,     g.source_w, g.source_h, g.batch,
                          source.row_stride, source.image_stride, cols + 2,   2};
    UNET_FAST_CUDA_RETURN_IF_ERROR(Encode(map, dtype, &k.source[s]));
    k.weight_channel[s] = channels;
    channels += source.channels;
  }
  const Roles roles = g.sources == 2 || channels > 64 ? Roles::kChannels : g.n > 64 ? Roles::kResults : Roles::kTiles;
  k.slices = roles == Roles::kChannels ? static_cast<int>(CeilDiv(g.n, 64)) : 1;
  k.first_slices = g.results == 2 ? g.result[0].channels / 64 : k.slices;
  if (roles == Roles::kChannels && g.sources == 1) {
    k.source[1] = k.source[0];
    k.source_channel[1] = k.weight_channel[1] = 64;
  }
  for (int t = 0; t < 9; ++t) {
    const Tap& tap = g.taps[0].tap[t];
    k.weight[(tap.row - first.row) * 3 + tap.col - first.col] = static_cast<uint8_t>(tap.index);
  }
  const WeightMap weights = g.transposed ? WeightMap{g.weights, channels, g.n, 9, g.ld, g.tap_stride, 64}
                                         : WeightMap{g.weights, g.n, channels, 9, g.ld, g.tap_stride, 64};
  UNET_FAST_CUDA_RETURN_IF_ERROR(Encode(weights, dtype, &k.weights));

  for (int group = 0; group < 2; ++group) {
    const int index = group < g.results ? group : 0;
    UNET_FAST_CUDA_RETURN_IF_ERROR(Encode(ResultMap(g, g.result[index], cols), dtype, &k.result[group]));
    k.masked[group] = g.result[index].mask != nullptr;
    if (k.masked[group]) UNET_FAST_CUDA_RETURN_IF_ERROR(Encode(MaskMap(g, index, cols), dtype, &k.mask[group]));
    k.result_channel[group] = group == 1 && g.results == 1 && roles == Roles::kResults ? 64 : 0;
  }
  const bool pooled = g.pooled != nullptr && g.out_h > 1 && g.out_w > 1;
  if (pooled) {
    const int h = g.out_h / 2, w = g.out_w / 2, row = w * g.n;
    const ImageMap map = {g.pooled, g.n, w, h, g.batch, row, static_cast<int64_t>(h) * row, cols / 2, 1};
    UNET_FAST_CUDA_RETURN_IF_ERROR(Encode(map, dtype, &k.pooled));
  }
  const int64_t pairs = CeilDiv(g.out_h, 2), tiles_per_image = pairs * CeilDiv(g.out_w, cols);
  k.pairs = Divisor(pairs), k.tiles_per_image = Divisor(tiles_per_image);
  k.n = g.n, k.tiles = static_cast<int>(tiles_per_image * g.batch);
  k.bias = g.bias, k.relu = g.relu;
  const auto launch = [&](auto type) -> int {
    using T = decltype(type);
    if (cols == 40) return LaunchStationary<T, 40>(stream, k, g.transposed, roles, pooled);
    if (cols == 48) return LaunchStationary<T, 48>(stream, k, g.transposed, roles, pooled);
    if (cols == 56) return LaunchStationary<T, 56>(stream, k, g.transposed, roles, pooled);
    return LaunchStationary<T, 64>(stream, k, g.transposed, roles, pooled);
  };
  return dtype == DType::kFloat16 ? launch(__half()) : launch(__nv_bfloat16());
}

int Upsample(void* stream, DType dtype, const GemmArgs& g) {
  const GemmSource& source = g.source[0];
  const GemmResult& result = g.result[0];
  constexpr int cols = upsampling::kCols;
  UpsamplingArgs k = {};
  const ImageMap pixels = {source.data,       source.channels,     g.source_w, g.source_h, g.batch,
                           source.row_stride, source.image_stride, cols + 1,   1};
  UNET_FAST_CUDA_RETURN_IF_ERROR(Encode(pixels, dtype, &k.source));
  const WeightMap weights = {g.weights, source.channels, g.n, 9, g.ld, g.tap_stride, 64};
  UNET_FAST_CUDA_RETURN_IF_ERROR(Encode(weights, dtype, &k.weights));
  // A step of the grid is two rows and two columns of the result.
  const ImageMap results = {
      result.data, g.n, 2 * g.out_w, 2 * g.out_h, g.batch, result.row_stride / 2, result.image_stride, 2 * cols, 1};
  UNET_FAST_CUDA_RETURN_IF_ERROR(Encode(results, dtype, &k.result));
  const int64_t tiles_per_image = g.out_h * CeilDiv(g.out_w, cols);
  k.rows = Divisor(g.out_h), k.tiles_per_image = Divisor(tiles_per_image);
  k.n = g.n, k.tiles = static_cast<int>(tiles_per_image * g.batch);
  k.bias = g.bias, k.relu = g.relu;
  const auto launch = [&](auto kernel) -> int {
    const int blocks = std::min(k.tiles, Multiprocessors());
    return Launch(kernel, blocks, upsampling::kThreads, upsampling::kSharedBytes, stream, k);
  };
  return dtype == DType::kFloat16 ? launch(UpsamplingKernel<__half>) : launch(UpsamplingKernel<__nv_bfloat16>);
}

}  // namespace unet_fast::gpu::sm90
