// The sm90 engine: the products of conv/gemm.h by TMA and wgmma, for compute capability 9.0.
#pragma once

#include <algorithm>
#include <string>

#include "conv/gemm.h"
#include "conv/sm90/config.h"

namespace unet_fast::gpu::sm90 {

struct FirstTap {
  int row = 127, col = 127;
};
inline FirstTap First(const TapList* lists, int count) {
  FirstTap first;
  for (int l = 0; l < count; ++l) {
    for (int t = 0; t < lists[l].count; ++t) {
      first.row = std::min<int>(first.row, lists[l].tap[t].row);
      first.col = std::min<int>(first.col, lists[l].tap[t].col);
    }
  }
  return first;
}

// Whether two neighbouring pixels are read as one of twice the channels, half of which a tap takes: with a stride of 2,
// so that neighbouring positions lie side by side.
bool InPairs(const GemmSource* source, int sources, int source_w, int stride, FirstTap first);

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
