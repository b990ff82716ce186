// What cuDNN wants laid out otherwise, and what it does not fuse. Contract as in conv/gpu.h; all channel counts and
// distances are multiples of 8.
#pragma once

#include "conv/cudnn/plan.h"
#include "conv/gemm.h"

namespace unet_fast::gpu::cudnn {

// Two windows side by side: to [batch, h, w, channels of both].
int Concatenate(void* stream, const GemmSource (&source)[2], int batch, int h, int w, void* to);

// Up to nine matrices, each somewhere in an array: rows `ld` apart, `offset` from its start, in elements.
struct Place {
  int64_t ld, offset[9];
};
struct Matrices {
  int count, rows, cols;  // of what is read
  Place from, to;
};
int Copy(void* stream, const Matrices& matrices, const void* from, void* to);
int Transpose(void* stream, const Matrices& matrices, const void* from, void* to);

// What of `epilogue` a plan has left undone, on data [batch, image], in place. The mask may be a window.
struct FinishArgs {
  int epilogue = 0;
  void* data;
  const void *bias, *mask;
  int64_t mask_image_stride, mask_row_stride;
};
int Finish(void* stream, DType dtype, int batch, const Image& image, const FinishArgs& args);

}  // namespace unet_fast::gpu::cudnn
