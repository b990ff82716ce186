// The gradient of the loss. It recomputes the softmax instead of having kept it - the logits are the smallest array
// around - and needs of the forward pass only its sums, from which each block prepares, for every class,
//   d loss / d p[k] = at_label[k] t[k] + linear[k] p[k] + constant[k].
#include "loss/gpu.h"
#include "loss/softmax.cuh"

namespace unet_fast::gpu {
namespace {

constexpr int kThreads = 256, kPixelsPerThread = 4;

template <typename T>
__global__ __launch_bounds__(kThreads) void GradKernel(const __grid_constant__ DiceCrossEntropyProblem p,
                                                       int64_t counted, const float* dloss, const void* labels,
                                                       const T* logits, const float* class_weights, const float* sums,
                                                       const float* ce, T* dlogits) {
  extern __shared__ float coefficients[];  // [3, classes]
  const int classes = static_cast<int>(p.classes);
  const int64_t sample = blockIdx.y;
  float *at_label = coefficients, *linear = at_label + classes, *constant = linear + classes;
  for (int k = threadIdx.x; k < classes; k += kThreads) {
    const float* s = sums + sample * 3 * classes + k;
    const double denominator = static_cast<double>(s[classes]) + s[2 * classes] + p.smooth;
    const bool counts = (p.include_background || k != 0) && !(p.has_ignore_class && k == p.ignore_class);
    double scale = 0.0, slope = 0.0;
    if (counts && denominator != 0) {
      scale = static_cast<double>(dloss[sample]) * p.dice_weight / counted / denominator;
      slope = scale * (2.0 * s[0] + p.smooth) / denominator;
    }
    at_label[k] = -2.0 * scale;
    linear[k] = p.squared ? 2.0 * slope : 0.0;
    constant[k] = p.squared ? 0.0 : slope;
  }
  __syncthreads();
  const float weight = ce[sample * 2 + 1];
  const float ce_scale = weight == 0 ? 0.0f : dloss[sample] * p.ce_weight / weight;
  for (int step = 0; step < kPixelsPerThread; ++step) {
    const int64_t pixel = (static_cast<int64_t>(blockIdx.x) * kPixelsPerThread + step) * kThreads + threadIdx.x;
    if (pixel >= p.pixels) return;
    const int64_t at = sample * p.pixels + pixel, label = LabelAt(labels, p.label_type, at);
    const T* logit = logits + at * classes;
    T* out = dlogits + at * classes;
    if (label < 0 || label >= classes || (p.has_ignore_class && label == p.ignore_class)) {
      for (int k = 0; k < classes; ++k) out[k] = FromFloat<T>(0.0f);
      continue;
    }
    const Softmax softmax(logit, classes);
    float mean = softmax.Probability(ToFloat(logit[label])) * at_label[label];  // sum over k of p[k] d loss / d p[k]
    for (int k = 0; k < classes; ++k) {
      const float probability = softmax.Probability(ToFloat(logit[k]));
      mean = fmaf(probability, fmaf(linear[k], probability, constant[k]), mean);
    }
    const float pixel_weight = ce_scale * class_weights[label];
    for (int k = 0; k < classes; ++k) {
      const float probability = softmax.Probability(ToFloat(logit[k])), t = k == label ? 1.0f : 0.0f;
      const float target = (1.0f - p.label_smoothing) * t + p.label_smoothing / classes;
      const float slope = at_label[k] * t + linear[k] * probability + constant[k] - mean;
      out[k] = FromFloat<T>(probability * slope + pixel_weight * (probability - target));
    }
  }
}

}  // namespace

int DiceCrossEntropyGrad(void* stream, const DiceCrossEntropyProblem& p, const float* dloss, const void* labels,
                         const void* logits, const float* class_weights, const float* sums, const float* ce,
                         void* dlogits) {
  const int64_t blocks = CeilDiv(p.pixels, kThreads * kPixelsPerThread);
  const size_t shared = static_cast<size_t>(3 * p.classes) * sizeof(float);
  if (p.batch == 0 || blocks == 0) return 0;
  if (p.batch > 65535) return cudaErrorNotSupported;
  return Dispatch16(p.dtype, [&](auto type) -> int {
    using T = decltype(type);
    return Launch(GradKernel<T>, dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(p.batch)), kThreads, shared,
                  stream, p, p.counted_classes(), dloss, labels, static_cast<const T*>(logits), class_weights, sums, ce,
                  static_cast<T*>(dlogits));
  });
}

}  // namespace unet_fast::gpu
