// conv2d_bias_relu and conv2d_transpose_bias_relu on the CPU, forward and gradient; shapes as in conv/problem.h.
#pragma once

#include "common/thread_pool.h"
#include "conv/problem.h"

namespace unet_fast::cpu {

struct Conv2DForward {
  const void *x, *skip, *kernel, *bias;
  void *y, *pooled;
};
struct Conv2DGradient {
  const void *dy, *dpooled, *y, *x, *skip, *kernel;
  void *dx, *dskip;  // not computed where null
  void *dkernel, *dbias;
};
void Conv2DBiasRelu(ThreadPool& pool, const Conv2DProblem& problem, const Conv2DForward& data);
void Conv2DBiasReluGrad(ThreadPool& pool, const Conv2DProblem& problem, const Conv2DGradient& data);

struct Conv2DTransposeForward {
  const void *x, *kernel, *bias;
  void* y;
};
struct Conv2DTransposeGradient {
  const void *dy, *y, *x, *kernel;
  void* dx;  // not computed where null
  void *dkernel, *dbias;
};
void Conv2DTransposeBiasRelu(ThreadPool& pool, const Conv2DTransposeProblem& problem,
                             const Conv2DTransposeForward& data);
void Conv2DTransposeBiasReluGrad(ThreadPool& pool, const Conv2DTransposeProblem& problem,
                                 const Conv2DTransposeGradient& data);

}  // namespace unet_fast::cpu
