// A convolution as cuDNN is asked for it, and its plans. No header of cuDNN is needed to include this.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace unet_fast::gpu::cudnn {

struct Image {
  int h, w, channels;
};

// What is computed of y = conv(x, filter): y; x, where y's gradient takes y's place; or the filter, likewise.
enum class Kind : int { kForward, kInputGradient, kWeightGradient };

// What is done to the result before it is stored, in this order.
enum Epilogue : int {
  kBias = 1,  // a number a channel is added
  kRelu = 2,
  kMask = 4,  // zeroed where an array of the result's shape is <= 0
};

// x [batch, x], filter [y.channels, kernel_h, kernel_w, x.channels], y [batch, y], all dense. Row i of y reads rows
// i * stride - pad_top ... of x. Nothing but what a plan depends on: its bytes are the key of the plan.
struct Convolution {
  Kind kind;
  DType dtype;
  int batch;
  Image x, y;
  int kernel_h, kernel_w, stride;
  int pad_top, pad_left, pad_bottom, pad_right;
  int epilogue;

  const Image& result() const { return kind == Kind::kForward ? y : x; }  // but of the weight gradient
};

// Bytes of workspace of a plan for the current device; -1 where there is none. `config` as in conv/cudnn/engine.h.
// `may_plan`: a plan that was not asked for before is made; else there is none.
int64_t PlanBytes(const Convolution& convolution, int config, bool may_plan);

struct Arrays {
  const void *x, *filter, *y;  // one of them is written
  const void *bias, *mask;
};
// Launches a plan that was made. 0 or a cudaError_t.
int Run(void* stream, const Convolution& convolution, int config, const Arrays& arrays, void* workspace);

// As Version of conv/cudnn/engine.h.
int64_t LibraryVersion();

}  // namespace unet_fast::gpu::cudnn
