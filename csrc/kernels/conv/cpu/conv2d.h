// conv2d_bias_relu and conv2d_transpose_bias_relu on the CPU, forward and gradient; shapes as in conv/problem.h.
#pragma once

#include "common/thread_pool.h"
#include "conv/data.h"
#include "conv/problem.h"

namespace unet_fast::cpu {

using unet_fast::Conv2DForward;
using unet_fast::Conv2DGradient;
using unet_fast::Conv2DTransposeForward;
using unet_fast::Conv2DTransposeGradient;

void Conv2DBiasRelu(ThreadPool& pool, const Conv2DProblem& problem, const Conv2DForward& data);
void Conv2DBiasReluGrad(ThreadPool& pool, const Conv2DProblem& problem, const Conv2DGradient& data);
void Conv2DTransposeBiasRelu(ThreadPool& pool, const Conv2DTransposeProblem& problem,
                             const Conv2DTransposeForward& data);
void Conv2DTransposeBiasReluGrad(ThreadPool& pool, const Conv2DTransposeProblem& problem,
                                 const Conv2DTransposeGradient& data);

}  // namespace unet_fast::cpu
