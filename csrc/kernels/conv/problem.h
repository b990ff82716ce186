// What a convolution is asked to do: plain sizes and flags, the same for every engine, and the arithmetic on them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/dtype.h"

namespace unet_fast {

using Dims = std::vector<int64_t>;

// y = activation(conv(concat(x, crop(skip)), kernel) + bias), stride 1, and its 2x2 max pool.
//   x      [batch, height, width, channels]
//   skip   [batch, skip_height, skip_width, skip_channels], centre-cropped to height x width; skip_channels 0: none
//   kernel [kernel_size, kernel_size, channels + skip_channels, filters]
//   y      [batch, out_height, out_width, filters]
//   pooled [batch, out_height / 2, out_width / 2, filters]
// Gradients have the shapes of what they are the gradients of, but for two:
//   dskip  [batch, height, width, skip_channels]: of the crop, since outside of it skip has none
//   dy     [batch, dy_height, dy_width, filters]: of y's centre, cropped like skip; zero outside of it
struct Conv2DProblem {
  DType dtype = DType::kFloat32;
  int64_t batch = 0, height = 0, width = 0, channels = 0;
  int64_t skip_height = 0, skip_width = 0, skip_channels = 0;
  int64_t filters = 0, kernel_size = 3;
  int64_t dy_height = 0, dy_width = 0;
  bool same = false;  // padding: zeros around x so that y has its size; else none
  bool relu = true;   // activation
  bool pool = false;  // also give the 2x2 max pool of y
  // Gradient: mask dx by x > 0 and dskip by skip > 0, which are ReLU outputs; needless where their producer does it.
  bool mask_dx = false, mask_dskip = false;
  bool dy_is_masked = false;  // gradient: dy is known to be zero wherever y <= 0, so it need not be masked

  int64_t pad() const { return same ? kernel_size / 2 : 0; }
  int64_t out_height() const { return height + 2 * pad() - kernel_size + 1; }
  int64_t out_width() const { return width + 2 * pad() - kernel_size + 1; }
  int64_t in_channels() const { return channels + skip_channels; }
  int64_t crop_top() const { return (skip_height - height) / 2; }
  int64_t crop_left() const { return (skip_width - width) / 2; }
  int64_t dy_top() const { return (out_height() - dy_height) / 2; }
  int64_t dy_left() const { return (out_width() - dy_width) / 2; }
  int64_t kernel_elements() const { return kernel_size * kernel_size * in_channels() * filters; }

  Dims x_dims() const { return {batch, height, width, channels}; }
  Dims dskip_dims() const { return {batch, height, width, skip_channels}; }
  Dims kernel_dims() const { return {kernel_size, kernel_size, in_channels(), filters}; }
  Dims y_dims() const { return {batch, out_height(), out_width(), filters}; }
  Dims pooled_dims() const { return {batch, out_height() / 2, out_width() / 2, filters}; }

  // Takes the sizes from shapes (skip null: none); the flags must be set. Gives what is wrong with them, or "".
  std::string SetDims(const Dims& x, const Dims* skip, const Dims& kernel);
  // For the gradient, after SetDims: likewise.
  std::string SetDyDims(const Dims& dy);
};

// y = activation(conv_transpose(x, kernel) + bias), stride 2, 'same': y[2i + r] += x[i] kernel[r], cut at 2 * height.
//   x [batch, height, width, channels], kernel [kernel_size, kernel_size, filters, channels]
//   y [batch, 2 height, 2 width, filters]
struct Conv2DTransposeProblem {
  DType dtype = DType::kFloat32;
  int64_t batch = 0, height = 0, width = 0, channels = 0;
  int64_t filters = 0, kernel_size = 3;  // 3 or 2
  bool relu = true;
  bool input_is_relu = false;  // gradient: mask dx by x > 0
  bool dy_is_masked = false;   // gradient: dy is known to be zero wherever y <= 0

  int64_t kernel_elements() const { return kernel_size * kernel_size * filters * channels; }
  Dims x_dims() const { return {batch, height, width, channels}; }
  Dims kernel_dims() const { return {kernel_size, kernel_size, filters, channels}; }
  Dims y_dims() const { return {batch, 2 * height, 2 * width, filters}; }

  std::string SetDims(const Dims& x, const Dims& kernel);
};

// "" where `dims` are `expected`, else a line that names the argument.
std::string CheckDims(const char* argument, const Dims& dims, const Dims& expected);
std::string ToString(const Dims& dims);

}  // namespace unet_fast
