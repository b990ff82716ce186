// The one element-wise pass of a gradient. The matrix products cannot mask as they load - asynchronous copies never see
// registers, and dz is read nine times by each - so dz is stored once, and its sum over the pixels, the bias gradient,
// is taken on the way. Where dy is dz already, only the sum is left.
//
// A thread takes 8 channels of quads of 2x2 pixels, which are the pooling windows. It is memory that it waits for, so
// all nine loads of a quad are under way before the first is used; and comparisons, on pairs of 16 bits, give masks of
// bits, not branches.
#include "conv/mask.h"

#include <algorithm>

#include "common/cuda.cuh"
#include "conv/reduce.h"

namespace unet_fast::gpu {
namespace {

constexpr int kThreads = 256;

// Of a gradient that is neither masked nor unpooled, the sum alone. Lanes and slabs as of MaskKernel. Registers for all
// loads in flight are worth more than further blocks on a multiprocessor, which the compiler would go for.
template <typename T, bool kVector>
__global__ __launch_bounds__(kThreads, 4) void SumKernel(const uint16_t* dy, int64_t pixels, int64_t channels,
                                                         float* slabs) {
  constexpr int kWidth = kVector ? kPack : 1, kInFlight = 8;  // channels of a thread, loads that it waits for
  const int64_t c = (blockIdx.y * blockDim.x + threadIdx.x) * kWidth, step = gridDim.x * blockDim.y;
  float sum[kWidth];
#pragma unroll
  for (int e = 0; e < kWidth; ++e) sum[e] = 0.0f;
  const auto add = [&sum](const uint4& words) {
#pragma unroll
    for (int e = 0; e < kWidth; ++e) sum[e] += ToFloat(reinterpret_cast<const T*>(&words)[e]);
  };
  int64_t pixel = c < channels ? blockIdx.x * blockDim.y + threadIdx.y : pixels;
  const uint16_t* from = dy + pixel * channels + c;
  const int64_t stride = step * channels;
  for (; pixel + (kInFlight - 1) * step < pixels; pixel += kInFlight * step, from += kInFlight * stride) {
    uint4 words[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) words[i] = LoadWords<kVector>(from + i * stride, kWidth);
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) add(words[i]);
  }
  for (; pixel < pixels; pixel += step, from += stride) add(LoadWords<kVector>(from, kWidth));
  __shared__ float sums[kThreads * kWidth];
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, width = blockDim.x * kWidth;  // of the block
#pragma unroll
  for (int e = 0; e < kWidth; ++e) sums[thread * kWidth + e] = sum[e];
  __syncthreads();
  const int64_t channel = blockIdx.y * width + thread;
  if (thread >= width || channel >= channels) return;
  float total = 0.0f;
  for (int y = 0; y < blockDim.y; ++y) total += sums[y * width + thread];
  slabs[blockIdx.x * channels + channel] = total;
}

// MaskArgs, in the 32 bits that the elements of an image are counted in.
struct KernelArgs {
  const uint16_t *dy, *dpooled, *y;
  uint16_t* dz;
  uint32_t h, w, channels, dy_h, dy_w, dy_top, dy_left;
  uint32_t quads;
  bool relu;
  float* slabs;
  Divisor quads_per_image, quads_per_row;
};

// A thread's channels of a pixel, in pairs of 16 bits: 8 channels, or one beside a zero.
template <bool kVector>
struct Channels {
  static constexpr int kPairs = kVector ? kPack / 2 : 1;
  uint32_t pair[kPairs];
};

// What lies at p, or `otherwise` where it is not wanted. Written so that it becomes a load under a predicate: around
// branches the loads of a quad would not all be on their way together.
template <bool kVector>
__device__ Channels<kVector> LoadIf(bool wanted, const uint16_t* p, uint32_t otherwise = 0) {
  Channels<kVector> v;
#pragma unroll
  for (uint32_t& pair : v.pair) pair = otherwise;
  if constexpr (kVector) {
    if (wanted) reinterpret_cast<uint4&>(v) = *reinterpret_cast<const uint4*>(p);
  } else {
    if (wanted) v.pair[0] = *p;
  }
  return v;
}
template <bool kVector>
__device__ void StoreIf(bool wanted, uint16_t* p, const Channels<kVector>& v) {
  if (!wanted) return;
  if constexpr (kVector) {
    *reinterpret_cast<uint4*>(p) = reinterpret_cast<const uint4&>(v);
  } else {
    *p = static_cast<uint16_t>(v.pair[0]);
  }
}

// All bits of the halves in which a > b.
template <typename T>
__device__ uint32_t Greater(uint32_t a, uint32_t b) {
  return __hgt2_mask(reinterpret_cast<const Pair<T>&>(a), reinterpret_cast<const Pair<T>&>(b));
}
template <typename T>
__device__ float2 ToFloats(uint32_t bits) {
  const Pair<T>& pair = reinterpret_cast<const Pair<T>&>(bits);
  return {ToFloat(pair.x), ToFloat(pair.y)};
}
template <typename T, bool kVector>
__global__ __launch_bounds__(kThreads, 3) void MaskKernel(const __grid_constant__ KernelArgs k) {
  using Loaded = Channels<kVector>;
  constexpr int kWidth = kVector ? kPack : 1;
  constexpr uint32_t kMinusZeros = 0x80008000u;  // added to anything, they leave all its bits as they are
  const uint32_t c = (blockIdx.y * blockDim.x + threadIdx.x) * kWidth;
  float sum[2 * Loaded::kPairs];
#pragma unroll
  for (float& s : sum) s = 0.0f;
  for (uint32_t quad = blockIdx.x * blockDim.y + threadIdx.y; quad < k.quads && c < k.channels;
       quad += gridDim.x * blockDim.y) {
    uint32_t in_image, qj;
    const uint64_t image = k.quads_per_image.Divide(quad, &in_image);
    const uint32_t qi = k.quads_per_row.Divide(in_image, &qj);
    const bool below = 2 * qi + 1 < k.h, right = 2 * qj + 1 < k.w;  // the quad's other pixels exist
    const bool pools = k.dpooled != nullptr && below && right;
    const uint32_t row = k.w * k.channels, dy_row = k.dy_w * k.channels;
    const uint64_t at = image * k.h * row + (2 * qi * row + 2 * qj * k.channels + c);
    // In dy, from its first pixel: left of it or above, numbers wrap around and are beyond its sides.
    const uint32_t dy_i = 2 * qi - k.dy_top, dy_j = 2 * qj - k.dy_left;
    const int64_t dy_at = image * k.dy_h * dy_row + static_cast<int32_t>(dy_i * dy_row + dy_j * k.channels + c);
    Loaded dy[4], y[4];
#pragma unroll
    for (uint32_t p = 0; p < 4; ++p) {
      const bool exists = (p / 2 == 0 || below) && (p % 2 == 0 || right);
      y[p] = LoadIf<kVector>(exists && (k.relu || pools), k.y + at + (p / 2 * row + p % 2 * k.channels));
      dy[p] = LoadIf<kVector>(dy_i + p / 2 < k.dy_h && dy_j + p % 2 < k.dy_w,
                              k.dy + dy_at + (p / 2 * dy_row + p % 2 * k.channels));
    }
    const uint64_t pooled_at = (image * (k.h / 2) + qi) * (k.w / 2) + qj;
    const Loaded dpooled = LoadIf<kVector>(pools, k.dpooled + pooled_at * k.channels + c, kMinusZeros);
#pragma unroll
    for (int e = 0; e < Loaded::kPairs; ++e) {
      // The first of equal maxima wins. A NaN wins where it comes first of the four, and elsewhere never.
      uint32_t wins[4] = {~0u}, top = y[0].pair[e];
#pragma unroll
      for (int p = 1; p < 4; ++p) {
        wins[p] = Greater<T>(y[p].pair[e], top);
        top = (y[p].pair[e] & wins[p]) | (top & ~wins[p]);
#pragma unroll
        for (int q = 0; q < p; ++q) wins[q] &= ~wins[p];
      }
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        const uint32_t kept = k.relu ? Greater<T>(y[p].pair[e], 0) : ~0u, won = wins[p] & kept;
        float2 v = ToFloats<T>(dy[p].pair[e] & kept);
        const float2 unpooled = ToFloats<T>((dpooled.pair[e] & won) | (kMinusZeros & ~won));
        v.x += unpooled.x, v.y += unpooled.y;
        sum[2 * e] += v.x, sum[2 * e + 1] += v.y;
        reinterpret_cast<Pair<T>&>(dy[p].pair[e]) = RoundedPair<T>(v.x, v.y);
      }
    }
#pragma unroll
    for (uint32_t p = 0; p < 4; ++p) {
      StoreIf<kVector>((p / 2 == 0 || below) && (p % 2 == 0 || right), k.dz + at + (p / 2 * row + p % 2 * k.channels),
                       dy[p]);
    }
  }
  __shared__ float sums[kThreads][kWidth + 1];
#pragma unroll
  for (int e = 0; e < kWidth; ++e) sums[threadIdx.y * blockDim.x + threadIdx.x][e] = sum[e];
  __syncthreads();
  if (threadIdx.y > 0 || c >= k.channels) return;
#pragma unroll
  for (int e = 0; e < kWidth; ++e) {
    for (int t = 1; t < blockDim.y; ++t) sum[e] += sums[t * blockDim.x + threadIdx.x][e];
    k.slabs[static_cast<int64_t>(blockIdx.x) * k.channels + c + e] = sum[e];
  }
}

}  // namespace

// Blocks that share the pixels; each leaves a partial sum.
static int SumBlocks(int64_t pixels) {
  constexpr int64_t kPixelsPerBlock = 256, kMaxBlocks = 1056;
  return static_cast<int>(std::clamp<int64_t>(pixels / kPixelsPerBlock, 1, kMaxBlocks));
}

size_t MaskSlabBytes(int64_t pixels, int64_t channels) {
  return static_cast<size_t>(SumBlocks(pixels)) * channels * sizeof(float);
}

int MaskGradient(void* stream, DType dtype, const MaskArgs& m) {
  const int64_t rows = CeilDiv(m.h, 2), cols = CeilDiv(m.w, 2), quads = m.batch * rows * cols;
  if (std::max(quads, m.h * m.w * m.channels) >= int64_t{1} << 31) return cudaErrorNotSupported;
  KernelArgs k = {};
  k.dy = static_cast<const uint16_t*>(m.dy), k.dpooled = static_cast<const uint16_t*>(m.dpooled);
  k.y = static_cast<const uint16_t*>(m.y), k.dz = static_cast<uint16_t*>(m.dz), k.slabs = m.slabs;
  k.h = static_cast<uint32_t>(m.h), k.w = static_cast<uint32_t>(m.w), k.channels = static_cast<uint32_t>(m.channels);
  k.dy_h = static_cast<uint32_t>(m.dy_h), k.dy_w = static_cast<uint32_t>(m.dy_w);
  k.dy_top = static_cast<uint32_t>(m.dy_top), k.dy_left = static_cast<uint32_t>(m.dy_left);
  k.quads = static_cast<uint32_t>(quads), k.relu = m.relu;
  k.quads_per_image = Divisor(rows * cols), k.quads_per_row = Divisor(cols);
  const bool vector = m.channels % kPack == 0;
  const int64_t groups = vector ? m.channels / kPack : m.channels;
  unsigned lanes = 1;
  while (lanes < 32 && lanes < groups) lanes *= 2;
  const int blocks = SumBlocks(m.batch * m.h * m.w);
  const dim3 grid(blocks, static_cast<unsigned>(CeilDiv(groups, lanes))), block(lanes, kThreads / lanes);
  UNET_FAST_CUDA_RETURN_IF_ERROR(Dispatch16(dtype, [&](auto type) -> int {
    using T = decltype(type);
    if (m.dz == nullptr && !m.relu && m.dpooled == nullptr) {
      return Launch(vector ? SumKernel<T, true> : SumKernel<T, false>, grid, block, 0, stream,
                    static_cast<const uint16_t*>(m.dy), m.batch * m.h * m.w, m.channels, m.slabs);
    }
    return Launch(vector ? MaskKernel<T, true> : MaskKernel<T, false>, grid, block, 0, stream, k);
  }));
  return SumSlabs(stream, dtype, blocks, {m.slabs, m.channels, m.dbias});
}

int ZeroWeightGradient(void* stream, void* dkernel, int64_t kernel_elements, void* dbias, int64_t filters) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  UNET_FAST_CUDA_RETURN_IF_ERROR(cudaMemsetAsync(dkernel, 0, kernel_elements * sizeof(uint16_t), on));
  return cudaMemsetAsync(dbias, 0, filters * sizeof(uint16_t), on);
}

}  // namespace unet_fast::gpu
