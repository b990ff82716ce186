// conv2d_bias_relu and conv2d_transpose_bias_relu on an NVIDIA GPU, forward and gradient; shapes as in conv/problem.h.
//
// A function only launches kernels on `stream` (a cudaStream_t) of the current device: it allocates no memory of the
// device, waits for none of its work, copies nothing, and may be captured into a CUDA graph. What it keeps, for the
// process, are streams to launch beside `stream` (common/side_stream.h) and cuDNN's plans. It returns 0 or a
// cudaError_t; cudaErrorNotSupported for float32, for bfloat16 before sm_80, and for an image of 2^31 elements or more.
// `workspace` is device memory of ...WorkspaceBytes(problem), aligned to 256 bytes; null where that is 0.
// Arrays are aligned to 16 bytes.
//
// What ...WorkspaceBytes says may depend on the current device (cuDNN's part does, and what was measured on it), and it
// plans what the launch will need: it comes before every launch on a device, and outside of a capture.
//
// Nothing is added atomically, so a result is the same to the bit whenever problem and tuning are the same.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "conv/data.h"
#include "conv/problem.h"

namespace unet_fast::gpu {

enum class Engine { kAuto = -1, kWmma, kSm90, kCudnn };

// Choices that otherwise follow from the problem and the device (conv/tuning.h). They change speed, and for `splits`
// the order of a sum. An engine that the device has not got, and a tile that does not fit the problem, are passed over.
struct Conv2DTuning {
  Engine engine = Engine::kAuto;
  // Index into the engine's tiles: kGemmTiles of conv/wmma/config.h, kGemmConfigs of conv/sm90/config.h; of cudnn, into
  // the plans that its heuristic proposes.
  int gemm = -1;
  int wgrad = -1;  // likewise: kWgradTiles, kWgradConfigs
  int splits = 0;  // partial sums of the weight gradient
  // Whether what the first engine to be tried does not serve, or fails at, is an error and not left to the next one.
  bool strict = false;
};

int Conv2DBiasRelu(void* stream, const Conv2DProblem& problem, const Conv2DForward& data, void* workspace,
                   const Conv2DTuning& tuning = {});
size_t Conv2DBiasReluWorkspaceBytes(const Conv2DProblem& problem, const Conv2DTuning& tuning = {});

int Conv2DBiasReluGrad(void* stream, const Conv2DProblem& problem, const Conv2DGradient& data, void* workspace,
                       const Conv2DTuning& tuning = {});
size_t Conv2DBiasReluGradWorkspaceBytes(const Conv2DProblem& problem, const Conv2DTuning& tuning = {});

int Conv2DTransposeBiasRelu(void* stream, const Conv2DTransposeProblem& problem, const Conv2DTransposeForward& data,
                            void* workspace, const Conv2DTuning& tuning = {});
size_t Conv2DTransposeBiasReluWorkspaceBytes(const Conv2DTransposeProblem& problem, const Conv2DTuning& tuning = {});

int Conv2DTransposeBiasReluGrad(void* stream, const Conv2DTransposeProblem& problem,
                                const Conv2DTransposeGradient& data, void* workspace, const Conv2DTuning& tuning = {});
size_t Conv2DTransposeBiasReluGradWorkspaceBytes(const Conv2DTransposeProblem& problem,
                                                 const Conv2DTuning& tuning = {});

// What a product would run on, on a device of a compute capability, 90 for 9.0: its engine, or "none"; and its tile, or
// why none.
struct ProductChoice {
  std::string product, engine, detail;
};
std::vector<ProductChoice> Conv2DChoices(const Conv2DProblem& problem, int capability);
std::vector<ProductChoice> Conv2DTransposeChoices(const Conv2DTransposeProblem& problem, int capability);

}  // namespace unet_fast::gpu
