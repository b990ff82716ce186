// What the loss and its gradient do alike: labels of any integer type, and the softmax of a pixel.
#pragma once

#include "common/cuda.cuh"
#include "loss/dice_cross_entropy.h"

namespace unet_fast::gpu {

__device__ inline int64_t LabelAt(const void* labels, LabelType type, int64_t i) {
  switch (type) {
    case LabelType::kUInt8:
      return static_cast<const uint8_t*>(labels)[i];
    case LabelType::kInt32:
      return static_cast<const int32_t*>(labels)[i];
    default:
      return static_cast<const int64_t*>(labels)[i];
  }
}

// With top the largest of a pixel's logits: p[k] = exp(logit[k] - top) * scale, log p[k] = logit[k] - top - log_sum.
struct Softmax {
  float top, log_sum, scale;

  template <typename T>
  __device__ Softmax(const T* logits, int classes) {
    top = ToFloat(logits[0]);
    for (int k = 1; k < classes; ++k) top = fmaxf(top, ToFloat(logits[k]));
    float sum = 0.0f;
    for (int k = 0; k < classes; ++k) sum += expf(ToFloat(logits[k]) - top);
    log_sum = logf(sum);
    scale = 1.0f / sum;
  }
  __device__ float Probability(float logit) const { return expf(logit - top) * scale; }
  __device__ float Log(float logit) const { return logit - top - log_sum; }
};

}  // namespace unet_fast::gpu
