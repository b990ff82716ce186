// What was chosen for this machine: the engine and configuration that a product runs on.
//
// A file a card holds it, read once a process, when a product is first met; without one the dispatch keeps to its
// rules. So a choice never depends on when it is asked for.
#pragma once

#include <string>

#include "conv/gemm.h"

namespace unet_fast::gpu {

struct Choice {
  Engine engine = Engine::kAuto;
  int config = -1;  // as Conv2DTuning's gemm and wgrad
  int splits = 0;
};

// A product in words, a line without tabs. It says nothing of which results of a gradient are wanted and masked: what
// is chosen for a product is chosen for its workspace too, which is asked for before that is known.
std::string ProductKey(DType dtype, const GemmArgs& args);
std::string ProductKey(DType dtype, const WgradArgs& args);
std::string ProductKey(const Product& product);

// As the environment variable UNET_FAST_ENGINE says; else as the current device's file has it; else left open.
Choice ChosenFor(const std::string& key);

// The current device's file, which need not exist: its name has the card, the driver, cuDNN's version and the sources'
// fingerprint, so that what was measured with others is not taken. "" without a device.
std::string TuningPath();
const char* EngineName(Engine engine);

}  // namespace unet_fast::gpu
