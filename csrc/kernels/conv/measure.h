// How long the products of a convolution take on each engine and configuration that serves them, on the current device.
#pragma once

#include <string>
#include <vector>

#include "conv/choice.h"
#include "conv/problem.h"

namespace unet_fast::gpu {

struct Timing {
  Choice choice;
  double microseconds;
};
struct MeasuredProduct {
  std::string name, key;        // "forward", and as in tuning.h
  std::vector<Timing> timings;  // the first is what the rules of the dispatch choose
};

// Allocates what the arrays of the problem take, twice at most, and waits for the device. Not to be called beside other
// work on it, which it would measure too. Gives 0 or a cudaError_t. Problems whose products have kernels of their own
// (conv/direct.h) give nothing.
int Measure(const Conv2DProblem& problem, std::vector<MeasuredProduct>* products);
int Measure(const Conv2DTransposeProblem& problem, std::vector<MeasuredProduct>* products);

}  // namespace unet_fast::gpu
