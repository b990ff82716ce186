// Convolutions too thin for a matrix product.
#pragma once

#include <cstddef>

#include "conv/gpu.h"

namespace unet_fast::gpu {

// Few input channels: the first layer, 1 to 7 of them and one input.
bool HasFewChannels(const Conv2DProblem& problem);
int FewChannelsForward(void* stream, const Conv2DProblem& problem, const Conv2DForward& data);
// The gradients of kernel and, where it is not null, bias. slabs: FewChannelsGradSlabBytes.
int FewChannelsGrad(void* stream, const Conv2DProblem& problem, const void* x, const void* dz, void* dkernel,
                    void* dbias, float* slabs);
size_t FewChannelsGradSlabBytes(const Conv2DProblem& problem);

// Few filters, 1x1: the last layer, 1 to 8 of them, one input, no pooling.
bool HasFewFilters(const Conv2DProblem& problem);
int FewFiltersForward(void* stream, const Conv2DProblem& problem, const Conv2DForward& data);
// The gradients of kernel and, where they are not null, x and bias. slabs: FewFiltersGradSlabBytes.
int FewFiltersGrad(void* stream, const Conv2DProblem& problem, const void* x, const void* dz, const void* kernel,
                   void* dx, void* dkernel, void* dbias, float* slabs);
size_t FewFiltersGradSlabBytes(const Conv2DProblem& problem);

}  // namespace unet_fast::gpu
