// The loss in one read of logits and labels. All Dice sums of five classes are one 16x16 Gram matrix: a pixel's vector
// is
//   z = [p_hi (5) | p_lo (5) | t (5) | 1],
// with t the one-hot label and p = p_hi + p_lo the softmax in two float16 numbers, which together hold 22 bits of it.
// G = sum over pixels of z z^T then contains
//   sum p^2 = hi.hi + 2 hi.lo + lo.lo,  sum p t = hi.t + lo.t,  sum p = hi.1 + lo.1,  sum t = t.1
// and is two tensor-core instructions for every 32 pixels of a warp, accumulated in float32. More than five classes are
// more blocks. The cross entropy, whose terms float16 could not hold, is added up in registers. A block covers a fixed
// number of pixels and leaves its sums in a slab; a second kernel adds the slabs in float64, in order, and ends the
// loss.
#include "conv/wmma/fragment.cuh"
#include "loss/gpu.h"
#include "loss/softmax.cuh"

namespace unet_fast::gpu {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kGroup = 5, kLd = 24;
constexpr int kPixelsPerThread = 8, kPixelsPerBlock = kThreads * kPixelsPerThread;

// A slab: [3, classes] sums (p t, p^2 or p, t), then weighted cross entropy, weight, number of bad labels.
__host__ __device__ int64_t SlabSize(int64_t classes) { return 3 * classes + 3; }
int64_t Blocks(const DiceCrossEntropyProblem& p) { return CeilDiv(p.pixels, kPixelsPerBlock); }

template <typename T>
__global__ __launch_bounds__(kThreads) void SumsKernel(const __grid_constant__ DiceCrossEntropyProblem p,
                                                       const void* labels, const T* logits, const float* class_weights,
                                                       float* slabs) {
  __shared__ __align__(128) __half z[kWarps][32 * kLd];
  __shared__ __align__(128) float gram[kWarps][16 * 16];
  __shared__ float scalars[kWarps][3];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, classes = static_cast<int>(p.classes);
  const int first_class = blockIdx.y * kGroup, group = min(kGroup, classes - first_class);
  const int64_t sample = blockIdx.z, first = static_cast<int64_t>(blockIdx.x) * kPixelsPerBlock;
  Accumulator sum;
  nvcuda::wmma::fill_fragment(sum, 0.0f);
  float entropy = 0.0f, weight = 0.0f, bad = 0.0f;
  for (int step = 0; step < kPixelsPerThread; ++step) {
    const int64_t pixel = first + step * kThreads + threadIdx.x, at = sample * p.pixels + pixel;
    __half* mine = z[warp] + lane * kLd;
    __syncwarp();
    *reinterpret_cast<uint4*>(mine) = make_uint4(0, 0, 0, 0);
    *reinterpret_cast<uint4*>(mine + 8) = make_uint4(0, 0, 0, 0);
    if (pixel < p.pixels) {
      const int64_t label = LabelAt(labels, p.label_type, at);
      if (p.has_ignore_class && label == p.ignore_class) {
        // leaves zeros
      } else if (label < 0 || label >= classes) {
        bad += 1.0f;
      } else {
        const T* logit = logits + at * classes;
        const Softmax softmax(logit, classes);
        for (int k = 0; k < group; ++k) {
          const float probability = softmax.Probability(ToFloat(logit[first_class + k]));
          const __half high = __float2half_rn(probability);
          mine[k] = high;
          mine[kGroup + k] = __float2half_rn(probability - __half2float(high));
        }
        const int64_t in_group = label - first_class;
        if (in_group >= 0 && in_group < group) mine[2 * kGroup + in_group] = __float2half_rn(1.0f);
        mine[15] = __float2half_rn(1.0f);
        float cross = -(1.0f - p.label_smoothing) * softmax.Log(ToFloat(logit[label]));
        if (p.label_smoothing != 0) {
          for (int k = 0; k < classes; ++k) cross -= p.label_smoothing / classes * softmax.Log(ToFloat(logit[k]));
        }
        entropy = fmaf(class_weights[label], cross, entropy);
        weight += class_weights[label];
      }
    }
    __syncwarp();
#pragma unroll
    for (int k = 0; k < 32; k += 16) {
      Fragment<matrix_a, __half, col_major> a;
      Fragment<matrix_b, __half, row_major> b;
      LoadFragment(a, z[warp] + k * kLd, kLd);
      LoadFragment(b, z[warp] + k * kLd, kLd);
      nvcuda::wmma::mma_sync(sum, a, b, sum);
    }
  }
  nvcuda::wmma::store_matrix_sync(gram[warp], sum, 16, nvcuda::wmma::mem_row_major);
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    entropy += __shfl_xor_sync(~0u, entropy, offset);
    weight += __shfl_xor_sync(~0u, weight, offset);
    bad += __shfl_xor_sync(~0u, bad, offset);
  }
  if (lane == 0) scalars[warp][0] = entropy, scalars[warp][1] = weight, scalars[warp][2] = bad;
  __syncthreads();
  float* slab = slabs + (sample * gridDim.x + blockIdx.x) * SlabSize(classes);
  const auto g = [&](int i, int j) {  // summed over the warps, in order
    float total = 0.0f;
    for (int w = 0; w < kWarps; ++w) total += gram[w][i * 16 + j];
    return total;
  };
  const int t = threadIdx.x;
  if (t < group) {
    const int high = t, low = kGroup + t, truth = 2 * kGroup + t, k = first_class + t;
    slab[k] = g(high, truth) + g(low, truth);
    slab[classes + k] = p.squared ? g(high, high) + 2.0f * g(high, low) + g(low, low) : g(high, 15) + g(low, 15);
    slab[2 * classes + k] = g(truth, 15);
  }
  if (blockIdx.y == 0 && t >= 32 && t < 35) {
    float total = 0.0f;
    for (int w = 0; w < kWarps; ++w) total += scalars[w][t - 32];
    slab[3 * classes + t - 32] = total;
  }
}

// A block a sample.
__global__ __launch_bounds__(kThreads) void LossKernel(const __grid_constant__ DiceCrossEntropyProblem p,
                                                       const float* slabs, int64_t blocks, float* loss, float* sums,
                                                       float* ce) {
  __shared__ double dice_loss[kThreads];
  __shared__ double scalars[3];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t sample = blockIdx.x, size = SlabSize(p.classes);
  const auto total = [&](int64_t column) {  // of the blocks: each lane every 32nd of them, then the lanes
    double v = 0.0;
    for (int64_t b = lane; b < blocks; b += 32) v += slabs[(sample * blocks + b) * size + column];
    for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(~0u, v, offset);
    return v;
  };
  double mine = 0.0;  // Dice loss of this warp's classes
  for (int64_t k = warp; k < p.classes; k += kWarps) {
    const double pt = total(k), pp = total(p.classes + k), tt = total(2 * p.classes + k);
    if (lane == 0) {
      float* out = sums + sample * 3 * p.classes + k;
      out[0] = pt, out[p.classes] = pp, out[2 * p.classes] = tt;
    }
    const double denominator = pp + tt + p.smooth;
    const bool counts = (p.include_background || k != 0) && !(p.has_ignore_class && k == p.ignore_class);
    // 0 / 0: a class that is nowhere, without smoothing, is a perfect match.
    if (counts && denominator != 0) mine += 1.0 - (2 * pt + p.smooth) / denominator;
  }
  if (warp < 3) {
    const double v = total(3 * p.classes + warp);
    if (lane == 0) scalars[warp] = v;
  }
  if (lane == 0) dice_loss[warp] = mine;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int w = 1; w < kWarps; ++w) mine += dice_loss[w];
  int64_t counted = p.classes - (p.include_background ? 0 : 1);
  if (p.has_ignore_class && p.ignore_class >= (p.include_background ? 0 : 1) && p.ignore_class < p.classes) --counted;
  ce[sample * 2] = scalars[0], ce[sample * 2 + 1] = scalars[1];
  const double value = p.ce_weight * (scalars[1] == 0 ? 0.0 : scalars[0] / scalars[1]) +
                       (counted == 0 ? 0.0 : p.dice_weight * mine / counted);
  loss[sample] = scalars[2] > 0 ? nanf("") : static_cast<float>(value);
}

}  // namespace

size_t DiceCrossEntropyWorkspaceBytes(const DiceCrossEntropyProblem& p) {
  return static_cast<size_t>(p.batch * Blocks(p) * SlabSize(p.classes)) * sizeof(float);
}

int DiceCrossEntropy(void* stream, const DiceCrossEntropyProblem& p, const void* labels, const void* logits,
                     const float* class_weights, float* loss, float* sums, float* ce, void* workspace) {
  if (p.batch == 0) return 0;
  // Grid limits: 65535 in y and z.
  if (p.batch > 65535 || CeilDiv(p.classes, kGroup) > 65535) return cudaErrorNotSupported;
  float* slabs = static_cast<float*>(workspace);
  const int64_t blocks = Blocks(p);
  if (blocks > 0) {
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(CeilDiv(p.classes, kGroup)),
                    static_cast<unsigned>(p.batch));
    UNET_FAST_CUDA_RETURN_IF_ERROR(Dispatch16(p.dtype, [&](auto type) -> int {
      using T = decltype(type);
      return Launch(SumsKernel<T>, grid, kThreads, 0, stream, p, labels, static_cast<const T*>(logits), class_weights,
                    slabs);
    }));
  }
  return Launch(LossKernel, static_cast<unsigned>(p.batch), kThreads, 0, stream, p, slabs, blocks, loss, sums, ce);
}

}  // namespace unet_fast::gpu
