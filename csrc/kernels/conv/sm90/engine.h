// The sm90 engine: the products of conv/gemm.h by TMA and wgmma, for compute capability 9.0.
#pragma once

#include <string>

#include "conv/gemm.h"
#include "conv/sm90/config.h"

namespace unet_fast::gpu::sm90 {

// Index of the configuration for a product, or -1 where the engine does not serve it. `forced`: that one if it serves.
int ChooseGemm(const GemmArgs& args, int forced);

// In words.
std::string DescribeGemm(int config);

struct WgradPlan {
  int config, splits, steps, steps_per_split;  // steps: of 64 positions
};
WgradPlan PlanWgrad(const WgradArgs& args, int forced_config, int forced_splits);
std::string Describe(const WgradPlan& plan);

int ImplicitGemm(void* stream, DType dtype, const GemmArgs& args, int config);
int StationaryGemm(void* stream, DType dtype, const GemmArgs& args);
int Upsample(void* stream, DType dtype, const GemmArgs& args);
// Partial sums go to slabs [splits, taps, channels, n] where there is more than one, else the sum to dweights; the sums
// of dz to bias_slabs [splits, n] unless null.
int Wgrad(void* stream, DType dtype, const WgradArgs& args, const WgradPlan& plan, float* bias_slabs);

}  // namespace unet_fast::gpu::sm90
