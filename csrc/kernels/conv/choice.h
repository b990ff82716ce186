// An engine with one of its configurations, for a product; and where choices are kept (conv/tuning.h).
#pragma once

#include <string>

#include "conv/gpu.h"

namespace unet_fast::gpu {

struct Choice {
  Engine engine = Engine::kAuto;
  int config = -1;  // as Conv2DTuning's gemm and wgrad
  int splits = 0;
};

const char* EngineName(Engine engine);

// The current device's file, which need not exist: its name has the card, the driver, cuDNN's version and the sources'
// fingerprint, so that what was measured with others is not taken. "" without a device.
std::string TuningPath();

}  // namespace unet_fast::gpu
