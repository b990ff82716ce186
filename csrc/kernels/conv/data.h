// The arrays of a convolution, as every engine takes them; shapes as in conv/problem.h.
#pragma once

namespace unet_fast {

struct Conv2DForward {
  const void *x, *skip, *kernel, *bias;
  void *y, *pooled;
};
struct Conv2DGradient {
  const void *dy, *dpooled, *y, *x, *skip, *kernel;
  void *dx, *dskip;  // not computed where null
  void *dkernel, *dbias;
};

struct Conv2DTransposeForward {
  const void *x, *kernel, *bias;
  void* y;
};
struct Conv2DTransposeGradient {
  const void *dy, *y, *x, *kernel;
  void* dx;  // not computed where null
  void *dkernel, *dbias;
};

}  // namespace unet_fast
