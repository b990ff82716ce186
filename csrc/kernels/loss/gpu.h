// dice_cross_entropy on an NVIDIA GPU; float16 and bfloat16 logits. Contract as in conv/gpu.h.
#pragma once

#include <cstddef>

#include "loss/dice_cross_entropy.h"

namespace unet_fast::gpu {

// As cpu::DiceCrossEntropy, except that a sample with a label that is neither a class nor ignored has a loss of NaN: to
// say which label it was, the host would have to wait.
int DiceCrossEntropy(void* stream, const DiceCrossEntropyProblem& problem, const void* labels, const void* logits,
                     const float* class_weights, float* loss, float* sums, float* ce, void* workspace);
size_t DiceCrossEntropyWorkspaceBytes(const DiceCrossEntropyProblem& problem);

int DiceCrossEntropyGrad(void* stream, const DiceCrossEntropyProblem& problem, const float* dloss, const void* labels,
                         const void* logits, const float* class_weights, const float* sums, const float* ce,
                         void* dlogits);

}  // namespace unet_fast::gpu
