// The first layer: one to seven input channels. It is as fast as its output can be written, and its gradient as dz can
// be read, if the arithmetic costs next to nothing: both are products on tensor cores whose operands go from global
// memory to registers. A patch of the input - kernel_size^2 * channels elements, one of them `index` - is gathered
// element by element from the caches.
//
// Forward: rows are pixels, 2 rows by 8 columns of an image, the sum runs over the patch and over a one that meets the
// bias. A warp keeps the weights of 64 filters in registers. Columns of the product are dealt to filters such that a
// thread has 8 neighbouring filters, which it stores at once, and both rows of its pixels, so that it pools them with
// its neighbour.
//
// Weight gradient: rows are the elements of a patch and a row of ones, whose sum is the bias gradient; columns are 64
// filters; the sum runs over 16 neighbouring pixels of an image row. A thread loads 8 filters of 4 pixels and pairs
// them up as the product wants them. Warps of a block are added in a fixed order, and blocks leave slabs for reduce.cu.
#include <algorithm>
#include <cmath>

#include "common/cuda.cuh"
#include "conv/direct.h"
#include "conv/reduce.h"
#include "ptx/mma.cuh"

namespace unet_fast::gpu {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kFilters = 64;
constexpr int kMmas = kFilters / 8;             // products of 8 columns
constexpr int kRows = 2, kCols = 8, kRun = 16;  // pixels of a tile: forward, and of the weight gradient

struct KernelArgs {
  const void *x, *kernel, *bias, *dz;
  void *y, *pooled;
  float *slabs, *bias_slabs;  // bias_slabs null: not wanted
  int h, w, channels, out_h, out_w, filters, kernel_size, pad, patch;
  uint32_t x_image, y_image;  // elements
  bool relu;
  Divisor tiles_per_image, tiles_per_row, patch_row;
  uint32_t tiles;
};

// Where a tile lies: rows x cols pixels at (row, col), and whether all their patches lie inside of the image.
struct Tile {
  uint32_t image;
  int row, col;
  bool inside;
  __device__ Tile(const KernelArgs& k, uint32_t tile, int rows, int cols) {
    uint32_t in_image, in_row;
    image = k.tiles_per_image.Divide(tile, &in_image);
    row = k.tiles_per_row.Divide(in_image, &in_row) * rows;
    col = in_row * cols;
    const int reach = k.kernel_size - 1 - k.pad;
    // Without branches.
    inside = (row >= k.pad) & (col >= k.pad) & (row + rows + reach <= k.h) & (col + cols + reach <= k.w);
  }
};

// The image of a tile.
__device__ const uint16_t* Image(const KernelArgs& k, const Tile& tile) {
  return static_cast<const uint16_t*>(k.x) + static_cast<uint64_t>(tile.image) * k.x_image;
}

// The way from the first element of a patch to another; zero behind it. A row of a patch lies in one piece in x.
__device__ uint32_t PatchOffset(const KernelArgs& k, int index) {
  uint32_t in_row;
  const uint32_t row = k.patch_row.Divide(index, &in_row);
  return index < k.patch ? row * k.w * k.channels + in_row : 0;
}

// The first element of the patch of pixel (row, col), if it lies in the image x.
__device__ const uint16_t* Patch(const KernelArgs& k, const uint16_t* x, int row, int col) {
  return Advance(x, ((row - k.pad) * k.w + col - k.pad) * k.channels);
}

// An element of that patch, with zeros around the image and behind the patch.
__device__ uint32_t PatchElement(const KernelArgs& k, const uint16_t* x, int row, int col, int index) {
  uint32_t in_row;
  row += static_cast<int>(k.patch_row.Divide(index, &in_row)) - k.pad;
  const int at = (col - k.pad) * k.channels + static_cast<int>(in_row);
  if (index >= k.patch || row < 0 || row >= k.h || at < 0 || at >= k.w * k.channels) return 0;
  return __ldg(x + row * k.w * k.channels + at);
}

template <typename T>
__device__ uint32_t Bits(float v) {
  const T rounded = FromFloat<T>(v);
  return *reinterpret_cast<const uint16_t*>(&rounded);
}

// What to keep of a pair of elements of a patch, and what to put in its place: a one right behind the patch, zeros
// further on.
template <typename T>
struct Fill {
  uint32_t keep, put;
  __device__ Fill(int patch, int index0, int index1) {
    keep = (index0 < patch ? 0xffff : 0) | (index1 < patch ? 0xffff0000 : 0);
    put = (index0 == patch ? Bits<T>(1.0f) : 0) | (index1 == patch ? Bits<T>(1.0f) << 16 : 0);
  }
  __device__ uint32_t operator()(uint32_t pair) const { return (pair & keep) | put; }
};

// Of the forward pass, on a multiprocessor at a time: as many as registers allow.
constexpr int ForwardBlocks(int steps) { return steps == 1 ? 3 : steps == 2 ? 2 : 1; }

// Rows g and g + 8 of a product are the pixels of column g in the tile's two image rows. Column n of its 8 products of
// 8 columns j is filter j / 4 * 32 + n / 2 * 8 + j % 4 * 2 + n % 2.
template <typename T, int kSteps, bool kVector>
__global__ __launch_bounds__(kThreads, ForwardBlocks(kSteps)) void ForwardKernel(const __grid_constant__ KernelArgs k) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, first = blockIdx.y * kFilters;
  // Of this thread's elements in a step of 16: 2t, 2t + 1, 2t + 8, 2t + 9.
  const auto index = [t](int s, int e) { return 16 * s + 2 * t + e / 2 * 8 + e % 2; };
  uint32_t weights[kSteps][kMmas][2];
  uint32_t offset[kSteps][4];
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
#pragma unroll
    for (int j = 0; j < kMmas; ++j) {
      const int f = first + j / 4 * 32 + g / 2 * 8 + j % 4 * 2 + g % 2;
      uint32_t w[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = index(s, e);
        w[e] = 0;
        if (f < k.filters && i < k.patch) w[e] = static_cast<const uint16_t*>(k.kernel)[i * k.filters + f];
        if (f < k.filters && i == k.patch) w[e] = static_cast<const uint16_t*>(k.bias)[f];
      }
      weights[s][j][0] = w[0] | w[1] << 16, weights[s][j][1] = w[2] | w[3] << 16;
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) offset[s][e] = PatchOffset(k, index(s, e));
  }
  // Only the last step goes beyond the patch.
  const Fill<T> fill[2] = {Fill<T>(k.patch, index(kSteps - 1, 0), index(kSteps - 1, 1)),
                           Fill<T>(k.patch, index(kSteps - 1, 2), index(kSteps - 1, 3))};

  // The larger of it and a result is the activation of the result.
  Pack<T> least;
#pragma unroll
  for (int e = 0; e < kPack; ++e) least.v[e] = FromFloat<T>(k.relu ? 0.0f : -INFINITY);

  for (uint32_t at = blockIdx.x * kWarps + threadIdx.x / 32; at < k.tiles; at += gridDim.x * kWarps) {
    const Tile tile(k, at, kRows, kCols);
    const uint16_t* x = Image(k, tile);
    const int col = tile.col + g;
    uint32_t element[kSteps][4][kRows];
    if (tile.inside) {
      const uint16_t* patch[kRows] = {Patch(k, x, tile.row, col), Patch(k, x, tile.row + 1, col)};
#pragma unroll
      for (int i = 0; i < kSteps * 4 * kRows; ++i) {
        element[i / 8][i / 2 % 4][i % 2] = __ldg(Advance(patch[i % 2], offset[i / 8][i / 2 % 4]));
      }
    } else {
#pragma unroll
      for (int i = 0; i < kSteps * 4 * kRows; ++i) {
        element[i / 8][i / 2 % 4][i % 2] = PatchElement(k, x, tile.row + i % 2, col, index(i / 8, i / 2 % 4));
      }
    }
    float sum[kMmas][4] = {};
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      uint32_t a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a[i] = ptx::LowerHalves(element[s][i / 2 * 2][i % 2], element[s][i / 2 * 2 + 1][i % 2]);
        if (s == kSteps - 1) a[i] = fill[i / 2](a[i]);
      }
#pragma unroll
      for (int j = 0; j < kMmas; ++j) ptx::Mma<T>(sum[j], a, weights[s][j]);
    }

#pragma unroll
    for (int half = 0; half < 2; ++half) {  // of the filters
      const int f = first + half * 32 + t * kPack, count = k.filters - f;
      Pack<T> out[kRows];
#pragma unroll
      for (int p = 0; p < kRows; ++p) {
        float v[kPack];
#pragma unroll
        for (int e = 0; e < kPack; ++e) v[e] = sum[half * 4 + e / 2][2 * p + e % 2];
        out[p] = Max(Rounded<T>(v), least);
        const uint32_t in_image = ((tile.row + p) * k.out_w + col) * k.filters + f;
        StorePack<kVector>(static_cast<T*>(k.y) + (static_cast<uint64_t>(tile.image) * k.y_image + in_image), out[p],
                           tile.row + p < k.out_h && col < k.out_w ? count : 0);
      }
      if (k.pooled == nullptr) continue;
      Pack<T> top = Max(out[0], out[1]), beside;
#pragma unroll
      for (int i = 0; i < kPack / 2; ++i) {
        PairAt(beside, i) = __shfl_xor_sync(~0u, PairAt(top, i), 4);
      }
      top = Max(top, beside);
      if (g % 2 != 0 || tile.row + 1 >= k.out_h || col + 1 >= k.out_w) continue;
      const uint32_t pixel = (tile.image * (k.out_h / 2) + tile.row / 2) * (k.out_w / 2) + col / 2;
      StorePack<kVector>(
          static_cast<T*>(k.pooled) + (static_cast<uint64_t>(pixel) * static_cast<uint32_t>(k.filters) + f), top,
          count);
    }
  }
}

// Filters f ... f + 7 of this thread's pixels of a tile: 2t, 2t + 1, 2t + 8, 2t + 9. Zeros beyond the results.
template <bool kVector>
__device__ void LoadDz(const KernelArgs& k, uint32_t at, int t, int f, uint4 (&dz)[4]) {
  const Tile tile(k, at, 1, kRun);
  const uint16_t* image = static_cast<const uint16_t*>(k.dz) + static_cast<uint64_t>(tile.image) * k.y_image;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int col = tile.col + 2 * t + e / 2 * 8 + e % 2;
    dz[e] = LoadWords<kVector>(Advance(image, (tile.row * k.out_w + col) * k.filters + f),
                               at < k.tiles && col < k.out_w ? k.filters - f : 0);
  }
}

// Rows g and g + 8 of product m are elements 16 m + g and 16 m + g + 8 of the patch, column n of its product j with 64
// filters is filter 8 n + j.
template <typename T, int kTiles, bool kVector>
__global__ __launch_bounds__(kThreads, kTiles == 1 ? 2 : 1) void WgradKernel(const __grid_constant__ KernelArgs k) {
  constexpr int kInFlight = kVector ? 2 : 1;       // tiles of dz that a warp waits for
  constexpr int kHalf = 8, kPitch = kFilters + 8;  // rows that are added at a time; a row, without bank conflicts
  __shared__ __align__(8) float partial[kWarps][kHalf][kPitch];
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int first = blockIdx.y * kFilters, f = first + g * kPack;
  const auto index = [g](int m, int r) { return 16 * m + 8 * r + g; };
  uint32_t offset[kTiles][2];
#pragma unroll
  for (int i = 0; i < kTiles * 2; ++i) offset[i / 2][i % 2] = PatchOffset(k, index(i / 2, i % 2));
  const Fill<T> fill[2] = {Fill<T>(k.patch, index(kTiles - 1, 0), index(kTiles - 1, 0)),
                           Fill<T>(k.patch, index(kTiles - 1, 1), index(kTiles - 1, 1))};
  float sum[kTiles][kMmas][4] = {};

  const uint32_t step = gridDim.x * kWarps;
  const uint32_t begin = blockIdx.x * kWarps + warp;
  uint4 dz[kInFlight][4];
#pragma unroll
  for (int u = 0; u < kInFlight; ++u) LoadDz<kVector>(k, begin + u * step, t, f, dz[u]);
  for (uint32_t turn = begin; turn < k.tiles; turn += kInFlight * step) {
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const uint32_t at = turn + u * step;
      const Tile tile(k, at, 1, kRun);
      const uint16_t* x = Image(k, tile);
      uint32_t a[kTiles][4];
      if (tile.inside && at < k.tiles) {
        const uint16_t* patch = Patch(k, x, tile.row, tile.col + 2 * t);
#pragma unroll
        for (int i = 0; i < kTiles * 4; ++i) {
          const uint16_t* left = Advance(patch, offset[i / 4][i % 2] + (i % 4 < 2 ? 0 : 8 * k.channels));
          a[i / 4][i % 4] = ptx::LowerHalves(__ldg(left), __ldg(Advance(left, k.channels)));
        }
      } else {
        // No results, no inputs: an infinity would make a NaN of dz's zeros.
        const int cols = at < k.tiles ? k.out_w : 0;
#pragma unroll
        for (int i = 0; i < kTiles * 4; ++i) {
          const int col = tile.col + 2 * t + i % 4 / 2 * 8, element = index(i / 4, i % 2);
          a[i / 4][i % 4] = ptx::LowerHalves(col < cols ? PatchElement(k, x, tile.row, col, element) : 0,
                                             col + 1 < cols ? PatchElement(k, x, tile.row, col + 1, element) : 0);
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) a[kTiles - 1][i] = fill[i % 2](a[kTiles - 1][i]);
      uint32_t b[kMmas][2];
#pragma unroll
      for (int j = 0; j < kMmas; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32_t p0 = Word(dz[u][2 * i], j / 2), p1 = Word(dz[u][2 * i + 1], j / 2);
          b[j][i] = j % 2 == 0 ? ptx::LowerHalves(p0, p1) : ptx::UpperHalves(p0, p1);
        }
      }
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int j = 0; j < kMmas; ++j) ptx::Mma<T>(sum[m][j], a[m], b[j]);
      }
      LoadDz<kVector>(k, at + kInFlight * step, t, f, dz[u]);
    }
  }

#pragma unroll
  for (int half = 0; half < kTiles * 2; ++half) {
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kMmas; ++j) {
      const float* two = sum[half / 2][j] + half % 2 * 2;
      *reinterpret_cast<float2*>(&partial[warp][g][j * 8 + 2 * t]) = make_float2(two[0], two[1]);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kHalf * kFilters; i += kThreads) {
      const int element = half * kHalf + i / kFilters, n = i % kFilters, filter = first + n;
      float v = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) v += partial[w][i / kFilters][n % 8 * 8 + n / 8];
      if (filter >= k.filters) continue;
      const int64_t block = blockIdx.x;
      if (element < k.patch) k.slabs[(block * k.patch + element) * k.filters + filter] = v;
      if (element == k.patch && k.bias_slabs != nullptr) k.bias_slabs[block * k.filters + filter] = v;
    }
  }
}

// rows, cols: of the pixels of a tile.
KernelArgs Arguments(const Conv2DProblem& p, int rows, int cols) {
  KernelArgs k = {};
  k.h = p.height, k.w = p.width, k.channels = p.channels;
  k.out_h = p.out_height(), k.out_w = p.out_width(), k.filters = p.filters;
  k.kernel_size = p.kernel_size, k.pad = p.pad(), k.patch = p.kernel_size * p.kernel_size * p.channels;
  k.relu = p.relu;
  k.x_image = p.height * p.width * p.channels, k.y_image = p.out_height() * p.out_width() * p.filters;
  const int64_t per_row = CeilDiv(p.out_width(), cols), per_image = CeilDiv(p.out_height(), rows) * per_row;
  k.tiles_per_image = Divisor(per_image), k.tiles_per_row = Divisor(per_row);
  k.patch_row = Divisor(p.kernel_size * p.channels);
  k.tiles = static_cast<uint32_t>(p.batch * per_image);
  return k;
}

// Numbers of 32 bits must do: of tiles, with room for a step beyond the last, and of an image's elements.
bool TooMany(const Conv2DProblem& p) {
  return p.batch * p.out_height() * CeilDiv(p.out_width(), kCols) >= int64_t{1} << 30 ||
         std::max(p.height * p.width * p.channels, p.out_height() * p.out_width() * p.filters) >= int64_t{1} << 31;
}

unsigned FilterBlocks(const Conv2DProblem& p) { return static_cast<unsigned>(CeilDiv(p.filters, kFilters)); }

// Slabs of the weight gradient: they may not depend on the device. On an H200 (132 multiprocessors) as many blocks run
// in whole waves, be it one, two or three at a time on each.
int Slabs(const Conv2DProblem& p) {
  const int64_t tiles = p.batch * p.out_height() * CeilDiv(p.out_width(), kRun);
  return static_cast<int>(std::clamp<int64_t>(tiles / (2 * kWarps), 1, 792));
}

// f(T(), products of 16 that hold the patch and one, whether filters come in vectors), the last two as types.
template <typename F>
int DispatchShape(const Conv2DProblem& p, int patch, F f) {
  return Dispatch16(p.dtype, [&](auto type) -> int {
    const auto with = [&](auto products) -> int {
      return p.filters % kPack == 0 ? f(type, products, std::true_type()) : f(type, products, std::false_type());
    };
    if (patch < 16) return with(std::integral_constant<int, 1>());
    if (patch < 32) return with(std::integral_constant<int, 2>());
    if (patch < 48) return with(std::integral_constant<int, 3>());
    return with(std::integral_constant<int, 4>());
  });
}

}  // namespace

bool HasFewChannels(const Conv2DProblem& p) { return p.channels < kPack && p.skip_channels == 0; }

int FewChannelsForward(void* stream, const Conv2DProblem& p, const Conv2DForward& d) {
  if (TooMany(p)) return cudaErrorNotSupported;
  KernelArgs k = Arguments(p, kRows, kCols);
  k.x = d.x, k.kernel = d.kernel, k.bias = d.bias, k.y = d.y, k.pooled = p.pool ? d.pooled : nullptr;
  return DispatchShape(p, k.patch, [&](auto type, auto steps, auto vector) -> int {
    const int64_t resident = Multiprocessors() * ForwardBlocks(steps());
    const dim3 grid(static_cast<unsigned>(std::min(resident, CeilDiv(k.tiles, kWarps))), FilterBlocks(p));
    return Launch(ForwardKernel<decltype(type), steps(), vector()>, grid, kThreads, 0, stream, k);
  });
}

size_t FewChannelsGradSlabBytes(const Conv2DProblem& p) {
  return Slabs(p) * static_cast<size_t>(p.kernel_elements() + p.filters) * sizeof(float);
}

int FewChannelsGrad(void* stream, const Conv2DProblem& p, const void* x, const void* dz, void* dkernel, void* dbias,
                    float* slabs) {
  if (TooMany(p)) return cudaErrorNotSupported;
  const int count = Slabs(p);
  KernelArgs k = Arguments(p, 1, kRun);
  k.x = x, k.dz = dz, k.slabs = slabs;
  if (dbias != nullptr) k.bias_slabs = slabs + count * p.kernel_elements();
  UNET_FAST_CUDA_RETURN_IF_ERROR(DispatchShape(p, k.patch, [&](auto type, auto tiles, auto vector) -> int {
    const dim3 grid(static_cast<unsigned>(count), FilterBlocks(p));
    return Launch(WgradKernel<decltype(type), tiles(), vector()>, grid, kThreads, 0, stream, k);
  }));
  return SumSlabs(stream, p.dtype, count, {slabs, p.kernel_elements(), dkernel}, {k.bias_slabs, p.filters, dbias});
}

}  // namespace unet_fast::gpu
