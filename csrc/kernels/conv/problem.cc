#include "conv/problem.h"

namespace unet_fast {
namespace {

std::string CheckRank4(const char* argument, const Dims& dims, const char* layout) {
  if (dims.size() == 4) return "";
  return std::string(argument) + ": expected a shape " + layout + ", got " + ToString(dims);
}

}  // namespace

std::string ToString(const Dims& dims) {
  std::string text = "[";
  for (size_t i = 0; i < dims.size(); ++i) text += (i > 0 ? ", " : "") + std::to_string(dims[i]);
  return text + "]";
}

std::string CheckDims(const char* argument, const Dims& dims, const Dims& expected) {
  if (dims == expected) return "";
  return std::string(argument) + ": expected shape " + ToString(expected) + ", got " + ToString(dims);
}

std::string Conv2DProblem::SetDims(const Dims& x, const Dims* skip, const Dims& kernel) {
  std::string error = CheckRank4("x", x, "[batch, height, width, channels]");
  if (error.empty()) error = CheckRank4("kernel", kernel, "[k, k, channels, filters]");
  if (error.empty() && skip != nullptr) error = CheckRank4("skip", *skip, "[batch, height, width, channels]");
  if (!error.empty()) return error;
  batch = x[0], height = x[1], width = x[2], channels = x[3];
  if (skip != nullptr) skip_height = (*skip)[1], skip_width = (*skip)[2], skip_channels = (*skip)[3];
  kernel_size = kernel[0], filters = kernel[3];
  if (kernel[0] != kernel[1] || (kernel_size != 3 && kernel_size != 1)) {
    return "kernel: expected 3x3 or 1x1, got shape " + ToString(kernel);
  }
  if (skip != nullptr && ((*skip)[0] != batch || skip_height < height || skip_width < width)) {
    return "skip: expected x's batch and at least its height and width, " + ToString(x) + ", got " + ToString(*skip);
  }
  if (kernel[2] != in_channels() || in_channels() < 1 || filters < 1) {
    return "kernel: expected " + std::to_string(in_channels()) +
           " input channels (x's and skip's) and 1 filter or more, got shape " + ToString(kernel);
  }
  if (out_height() < 1 || out_width() < 1) {
    return "x: expected at least " + std::to_string(same ? 1 : kernel_size) + " rows and columns, got shape " +
           ToString(x);
  }
  return "";
}

std::string Conv2DProblem::SetDyDims(const Dims& dy) {
  std::string error = CheckRank4("dy", dy, "[batch, height, width, filters]");
  if (!error.empty()) return error;
  if (dy[0] != batch || dy[1] > out_height() || dy[2] > out_width() || dy[3] != filters) {
    return "dy: expected y's shape " + ToString(y_dims()) + " or a smaller height and width, got " + ToString(dy);
  }
  dy_height = dy[1], dy_width = dy[2];
  return "";
}

std::string Conv2DTransposeProblem::SetDims(const Dims& x, const Dims& kernel) {
  std::string error = CheckRank4("x", x, "[batch, height, width, channels]");
  if (error.empty()) error = CheckRank4("kernel", kernel, "[k, k, filters, channels]");
  if (!error.empty()) return error;
  batch = x[0], height = x[1], width = x[2], channels = x[3];
  kernel_size = kernel[0], filters = kernel[2];
  if (kernel[0] != kernel[1] || (kernel_size != 3 && kernel_size != 2)) {
    return "kernel: expected 3x3 or 2x2, got shape " + ToString(kernel);
  }
  if (kernel[3] != channels || channels < 1 || filters < 1) {
    return "kernel: expected " + std::to_string(channels) +
           " input channels (x's, in its last dimension) and 1 filter or more, got shape " + ToString(kernel);
  }
  if (height < 1 || width < 1) return "x: expected at least 1 row and column, got shape " + ToString(x);
  return "";
}

}  // namespace unet_fast
