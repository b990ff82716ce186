// The implicit GEMM that convolutions are made of: what it is given, and its launcher.
//
//   result[m, n] = sum over sources, channels c, taps t of source[pixel(m) * stride + offset(t), c] * weights[t, c, n]
//
// m runs over the pixels of a grid [batch, out_h, out_w] in quads of 2x2, so that a tile holds whole pooling windows; a
// source may be a window of a larger array, and what lies outside of it is zero. It serves
//   - the forward pass: sources x and skip, weights [t, c, n];
//   - its input gradient: source dz, weights read transposed [t, n, c], results to dx and dskip;
//   - the transposed convolution: a grid a parity, weights [t, n, c], results to every other pixel;
//   - its input gradient: source dz with stride 2, weights [t, c, n].
#pragma once

#include <cstdint>
#include <vector>

#include "common/cuda.cuh"
#include "conv/gpu.h"

namespace unet_fast::gpu {

struct GemmSource {
  const void* data;  // pixel (0, 0) of the window
  int64_t image_stride;
  int row_stride, channels;  // a pixel is `channels` elements
};

struct GemmResult {
  void* data;        // pixel (0, 0) of the grid
  const void* mask;  // like data, but see GemmArgs; results are zeroed where it is <= 0. Null: none
  int64_t image_stride, row_stride;
  int pixel_stride, channels;
};

struct Tap {
  int8_t row, col;  // offset of the source pixel
  int8_t index;     // of the weights
};
struct TapList {
  int count = 0;
  Tap tap[9];
  int64_t result_offset = 0;  // elements, to this list's first pixel
  // Set by the launcher: the way to a tap in each source, and in the weights, in elements; and how far taps reach.
  int source_offset[2][9];
  int weight_offset[9];
  int first_row = 0, last_row = 0, first_col = 0, last_col = 0;

  void Add(int64_t row, int64_t col, int64_t index) {
    tap[count++] = {static_cast<int8_t>(row), static_cast<int8_t>(col), static_cast<int8_t>(index)};
  }
};

struct GemmArgs {
  GemmSource source[2];
  int sources = 1;
  int source_h = 0, source_w = 0, stride = 1;
  const void* weights = nullptr;
  int64_t tap_stride = 0;
  int ld = 0;               // elements between weights of neighbouring c, or n where transposed
  bool transposed = false;  // weights [t, n, c], one source only
  bool vector = false;      // every channel count and n is a multiple of 8
  int batch = 0, out_h = 0, out_w = 0, n = 0;
  int whole_n = 0;  // where not every result is wanted: n if they were
  TapList taps[4];
  int lists = 1;
  GemmResult result[2];  // the columns of the first, which may be none, come before those of the second
  int results = 1;
  // Of the second result's mask, which may be a window of a larger array, as the first's may not.
  int64_t mask_image_stride = 0, mask_row_stride = 0;
  const void* bias = nullptr;
  bool relu = false;
  void* pooled = nullptr;  // [batch, out_h / 2, out_w / 2, n], of one result only

  Divisor quads_per_image, quads_per_row;  // set by the launcher
};

// `workspace`: GemmWorkspaceBytes.
int ImplicitGemm(void* stream, DType dtype, const GemmArgs& args, const Conv2DTuning& tuning, void* workspace);
size_t GemmWorkspaceBytes(DType dtype, const GemmArgs& args, const Conv2DTuning& tuning);

// dweights[t, c, n] = sum over pixels p of source[p * stride + offset(t), c] * dz[p, n], one list of taps, in `splits`
// partial sums over p.
struct WgradArgs {
  GemmSource source[2];
  int sources = 1;
  int source_h = 0, source_w = 0, stride = 1;
  const void* dz = nullptr;  // [batch, out_h, out_w, n]
  int batch = 0, out_h = 0, out_w = 0, n = 0;
  TapList taps;
  bool vector = false;
  void* dweights = nullptr;
  float* slabs = nullptr;       // WgradWorkspaceBytes, for the partial sums
  void* dbias = nullptr;        // also the sum of dz over the pixels, [n]; null: not wanted
  float* bias_slabs = nullptr;  // BiasSlabBytes

  Divisor pixels_per_image, pixels_per_row, channels;  // set by the launcher, as what follows
  int pixels_per_split = 0;
};

int Wgrad(void* stream, DType dtype, const WgradArgs& args, const Conv2DTuning& tuning);
size_t WgradWorkspaceBytes(DType dtype, const WgradArgs& args, const Conv2DTuning& tuning);
size_t BiasSlabBytes(DType dtype, const WgradArgs& args, const Conv2DTuning& tuning);

// One of the products that an op consists of.
struct Product {
  const char* name;
  DType dtype;
  bool is_wgrad;
  GemmArgs gemm;    // unless is_wgrad
  WgradArgs wgrad;  // where is_wgrad
};
// Of an op's forward pass and its gradient, of dz where the gradient is masked already; none where kernels of their own
// serve it (conv/direct.h).
std::vector<Product> Products(const Conv2DProblem& problem, const Conv2DForward& forward,
                              const Conv2DGradient& gradient, const void* dz);
std::vector<Product> Products(const Conv2DTransposeProblem& problem, const Conv2DTransposeForward& forward,
                              const Conv2DTransposeGradient& gradient, const void* dz);
ProductChoice Describe(const Product& product, int capability);

}  // namespace unet_fast::gpu
