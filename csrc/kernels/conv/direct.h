// Convolutions too thin for a matrix product.
#pragma once

#include <cstddef>

#include "conv/gpu.h"

namespace unet_fast::gpu {

// Few input channels: the first layer, 1 to 7 of them and one input.
bool HasFewChannels(const Conv2DProblem& problem);
int FewChannelsForward(void* stream, const Conv2DProblem& problem, const Conv2DForward& data);
size_t FewChannelsWgradSlabBytes(const Conv2DProblem& problem);
int FewChannelsWgrad(void* stream, const Conv2DProblem& problem, const void* x, const void* dz, void* dkernel,
                     float* slabs);

// Few filters, 1x1: the last layer, 1 to 8 of them, one input, no pooling.
bool HasFewFilters(const Conv2DProblem& problem);
int FewFiltersForward(void* stream, const Conv2DProblem& problem, const Conv2DForward& data);
int FewFiltersDgrad(void* stream, const Conv2DProblem& problem, const void* dz, const void* x, const void* kernel,
                    void* dx);
size_t FewFiltersWgradSlabBytes(const Conv2DProblem& problem);
int FewFiltersWgrad(void* stream, const Conv2DProblem& problem, const void* x, const void* dz, void* dkernel,
                    float* slabs);

}  // namespace unet_fast::gpu
