// The cudnn engine: the products of conv/gemm.h by cuDNN 9, for float16 and bfloat16 with sums in float32.
//
// A product is planned before it runs, and plans last as long as the process: ...WorkspaceBytes asks cuDNN's heuristic
// and may compile kernels, which takes milliseconds to seconds and must not happen under stream capture; what runs the
// product only launches. Products are planned for the device that is current. All of it may be called by any thread.
#pragma once

#include <cstdint>

#include "conv/gemm.h"

namespace unet_fast::gpu::cudnn {

// Bytes of workspace, or -1 where cuDNN does not serve the product, or there is no cuDNN or no device. The arrays that
// `args` names are not touched; it matters alone which there are. `config`: which of the plans that cuDNN's heuristic
// proposes, in its order, -1 for the first that works; those that would not be the same to the bit run after run, or
// not as accurate as ours, are passed over, and are not served where `config` names one.
int64_t GemmWorkspaceBytes(DType dtype, const GemmArgs& args, int config);
int64_t WgradWorkspaceBytes(DType dtype, const WgradArgs& args, int config);

// Give 0 or a cudaError_t; cudaErrorNotSupported where the product was not planned. The bias gradient that WgradArgs
// may ask for is left to the caller.
int Gemm(void* stream, DType dtype, const GemmArgs& args, int config, void* workspace);
int Wgrad(void* stream, DType dtype, const WgradArgs& args, int config, void* workspace);

// Of the cuDNN that is loaded, 90300 for 9.3.0; 0 without one.
int64_t Version();

}  // namespace unet_fast::gpu::cudnn
