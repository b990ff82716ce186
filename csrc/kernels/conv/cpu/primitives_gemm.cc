// Weight gradient by Eigen's matrix product, and the conversions to and from 16-bit types.
//
// For one kernel row r, the kw horizontal taps of ci channels that belong to a grid point are kw * ci consecutive
// floats of x, and the next point's begin ci floats later. So the matrix [kw * ci, points] is x itself, read with an
// outer stride of ci that is smaller than its columns are long: no im2col buffer, and Eigen's packing reads it as it
// is.
#include "conv/cpu/rename_eigen.h"

#include "Eigen/Core"

#include <algorithm>

#include "conv/cpu/primitives.h"

namespace unet_fast::cpu::UNET_FAST_ISA {
namespace {

// Output tile of one task. Larger tiles amortise packing, smaller ones give more tasks.
constexpr int64_t kTileFilters = 512, kTileTaps = 1536;

template <class T>
void Load(const void* source, float* target, int64_t count) {
  Eigen::Map<Eigen::ArrayXf>(target, count) =
      Eigen::Map<const Eigen::Array<T, Eigen::Dynamic, 1>>(static_cast<const T*>(source), count).template cast<float>();
}
template <class T>
void Store(const float* source, void* target, int64_t count) {
  Eigen::Map<Eigen::Array<T, Eigen::Dynamic, 1>>(static_cast<T*>(target), count) =
      Eigen::Map<const Eigen::ArrayXf>(source, count).template cast<T>();
}

}  // namespace

void EigenWgrad(ThreadPool& pool, const WgradArgs& a) {
  using Eigen::OuterStride;
  using ConstMatrix = Eigen::Map<const Eigen::MatrixXf, 0, OuterStride<>>;
  using Matrix = Eigen::Map<Eigen::MatrixXf, 0, OuterStride<>>;
  const int64_t ci = a.x.c, co = a.dz.c, taps = a.kw * ci;
  const int64_t rows = a.dz.h - a.kh + 1, cols = a.dz.w - a.kw + 1;
  const int64_t filter_tiles = (co + kTileFilters - 1) / kTileFilters;
  const int64_t tap_tiles = (taps + kTileTaps - 1) / kTileTaps;
  const int64_t tiles = a.kh * filter_tiles * tap_tiles;
  const int64_t all_rows = a.n * rows;
  ParallelFor(pool, tiles * a.slabs, [&](int64_t task) {
    const int64_t slab = task / tiles, r = task % tiles / (filter_tiles * tap_tiles);
    const int64_t m0 = task % filter_tiles * kTileFilters, n0 = task / filter_tiles % tap_tiles * kTileTaps;
    const int64_t m = std::min(kTileFilters, co - m0), n = std::min(kTileTaps, taps - n0);
    Matrix dkernel(a.dkernel + slab * a.slab_stride + (r * taps + n0) * co + m0, m, n, OuterStride<>(co));
    if (!a.add) dkernel.setZero();
    int64_t row = all_rows * slab / a.slabs;
    const int64_t end = all_rows * (slab + 1) / a.slabs;
    while (row < end) {  // one product an image
      const int64_t image = row / rows, i = row % rows;
      const int64_t count = std::min(end - row, rows - i);
      const int64_t points =
          (count - 1) * a.dz.w + cols;  // the rest of the last row is zero, and beyond may be nothing
      ConstMatrix dz(a.dz.At(image, i, 0) + m0, m, points, OuterStride<>(co));
      ConstMatrix x(a.x.At(image, i + r, 0) + n0, n, points, OuterStride<>(ci));
      dkernel.noalias() += dz * x.transpose();
      row += count;
    }
  });
}

void ToFloat(const void* source, DType type, float* target, int64_t count) {
  switch (type) {
    case DType::kFloat32:
      return Load<float>(source, target, count);
    case DType::kFloat16:
      return Load<Eigen::half>(source, target, count);
    case DType::kBFloat16:
      return Load<Eigen::bfloat16>(source, target, count);
  }
}

void FromFloat(const float* source, DType type, void* target, int64_t count) {
  switch (type) {
    case DType::kFloat32:
      return Store<float>(source, target, count);
    case DType::kFloat16:
      return Store<Eigen::half>(source, target, count);
    case DType::kBFloat16:
      return Store<Eigen::bfloat16>(source, target, count);
  }
}

}  // namespace unet_fast::cpu::UNET_FAST_ISA
