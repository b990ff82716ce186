// The wmma engine: the products of conv/gemm.h by nvcuda::wmma, for every device with Tensor Cores.
#pragma once

#include <cstddef>

#include "conv/gemm.h"

namespace unet_fast::gpu::wmma {

int ImplicitGemm(void* stream, DType dtype, GemmArgs args, int tile);
int Wgrad(void* stream, DType dtype, WgradArgs args, int tile, int splits);
size_t WgradSlabBytes(const WgradArgs& args, int tile, int splits);

}  // namespace unet_fast::gpu::wmma
