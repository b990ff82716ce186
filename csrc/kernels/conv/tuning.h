// What was chosen for this machine: the engine and configuration that a product runs on.
//
// A file a card holds it, read once a process, when a product is first met. Where it has nothing of a product, what was
// measured before the build counts; where that has nothing, the dispatch keeps to its rules. So a choice never depends
// on when it is asked for.
#pragma once

#include <string>
#include <vector>

#include "conv/choice.h"
#include "conv/gemm.h"

namespace unet_fast::gpu {

// A product in words, a line without tabs. It says nothing of which results of a gradient are wanted and masked: what
// is chosen for a product is chosen for its workspace too, which is asked for before that is known.
std::string ProductKey(DType dtype, const GemmArgs& args);
std::string ProductKey(DType dtype, const WgradArgs& args);
std::string ProductKey(const Product& product);

// As the environment variable UNET_FAST_ENGINE says; else as the current device's file has it; else as shipped.
Choice ChosenFor(const std::string& key);

// As the package's own table (measured.h) has it for devices of a compute capability; else left open.
Choice ShippedFor(const std::string& key, int capability);

// What the dispatch may be told to choose for a product on the current device: first what it chooses by itself, then
// all else. An engine's configurations are those that serve the product.
std::vector<Choice> Candidates(DType dtype, const GemmArgs& args);
std::vector<Choice> Candidates(DType dtype, const WgradArgs& args);

}  // namespace unet_fast::gpu
