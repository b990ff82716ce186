// How the products of conv/gemm.h become convolutions of cuDNN.
//
// Its fast kernels want dense images, channels last, and filters [y's channels, rows, columns, x's channels]. So two
// sources are copied side by side first, and weights reordered, into the workspace. With them
//   - a product of one list of taps is a convolution whose filter has the taps in the order of their offsets, be it a
//     forward pass or an input gradient, and the least offset is the padding;
//   - that of four lists, the forward pass of a transposed convolution, is the input gradient of a convolution with
//     stride 2: source pixel i gives to result pixel 2 i + r;
//   - of two results each is a convolution of its own, by its part of the filter.
// Bias, ReLU and mask are fused where cuDNN plans that; where it does not, or the mask is a window, one pass follows.
#include "conv/cudnn/engine.h"

#include <algorithm>

#include "common/cuda.cuh"
#include "conv/cudnn/layout.h"
#include "conv/cudnn/plan.h"
#include "conv/workspace.h"
#include "pool/gpu.h"

namespace unet_fast::gpu::cudnn {
namespace {

constexpr int kMostTaps = 9;

// Taps as the rectangle that they fill: a filter. `top` of its rows lie above the pixel, `left` of its columns beside.
struct Filter {
  int h = 0, w = 0, top = 0, left = 0;
  int index[kMostTaps];  // of the weights, row by row

  int taps() const { return h * w; }  // 0: no rectangle
};

// `offset[t]` is tap t's, of `count`.
Filter Rectangle(const Tap* offset, int count) {
  if (count < 1 || count > kMostTaps) return {};
  int top = 0, bottom = 0, left = 0, right = 0;  // a filter takes part of the pixel itself
  for (int t = 0; t < count; ++t) {
    top = std::min<int>(top, offset[t].row), bottom = std::max<int>(bottom, offset[t].row);
    left = std::min<int>(left, offset[t].col), right = std::max<int>(right, offset[t].col);
  }
  Filter f;
  f.h = bottom - top + 1, f.w = right - left + 1, f.top = -top, f.left = -left;
  if (f.taps() != count) return {};
  std::fill(f.index, f.index + count, -1);
  for (int t = 0; t < count; ++t) {
    f.index[(offset[t].row - top) * f.w + offset[t].col - left] = offset[t].index;
  }
  return std::find(f.index, f.index + count, -1) == f.index + count ? f : Filter{};
}

Filter FilterOf(const GemmArgs& g) {
  if (g.lists == 1) return Rectangle(g.taps[0].tap, g.taps[0].count);
  // A tap of the parity (a, b) reads source pixel i for the result's pixel 2 (i - offset) + parity.
  Tap offset[4 * kMostTaps];
  int count = 0;
  for (int l = 0; l < g.lists; ++l) {
    for (int t = 0; t < g.taps[l].count; ++t) {
      const Tap& tap = g.taps[l].tap[t];
      offset[count++] = {static_cast<int8_t>(l / 2 - 2 * tap.row), static_cast<int8_t>(l % 2 - 2 * tap.col), tap.index};
    }
  }
  return Rectangle(offset, count);
}

bool Takes(DType dtype, bool vector) {
  return vector && dtype != DType::kFloat32 && ComputeCapability() >= (dtype == DType::kBFloat16 ? 80 : 70);
}

template <typename Args>
Image SourceOf(const Args& g) {
  return {g.source_h, g.source_w, g.source[0].channels + (g.sources == 2 ? g.source[1].channels : 0)};
}
bool IsDense(const GemmSource& s, int h, int w) {
  const int64_t row = static_cast<int64_t>(w) * s.channels;
  return s.row_stride == row && s.image_stride == h * row;
}
template <typename Args>
bool HasSource(const Args& g) {
  return g.sources == 2 || IsDense(g.source[0], g.source_h, g.source_w);
}

// Whether the results are dense: of four lists all of them together.
bool HasDenseResults(const GemmArgs& g) {
  if (g.lists == 1) {
    for (int r = 0; r < g.results; ++r) {
      const GemmResult& to = g.result[r];
      const int64_t row = static_cast<int64_t>(g.out_w) * to.channels;
      if (to.channels > 0 &&
          (to.pixel_stride != to.channels || to.row_stride != row || to.image_stride != g.out_h * row)) {
        return false;
      }
    }
    return true;
  }
  const GemmResult& to = g.result[0];
  const int64_t row = int64_t{2} * g.out_w * g.n;
  for (int l = 0; l < g.lists; ++l) {
    if (g.taps[l].result_offset != l / 2 * row + l % 2 * g.n) return false;
  }
  return to.pixel_stride == 2 * g.n && to.row_stride == 2 * row && to.image_stride == 2 * g.out_h * row;
}

// Whether offsets into [batch, image] fit into 31 bits.
bool Fits(int batch, const Image& image) {
  constexpr int64_t kLimit = int64_t{1} << 31;
  const int64_t rows = static_cast<int64_t>(batch) * image.h;
  return rows < kLimit && rows * image.w < kLimit && rows * image.w * image.channels < kLimit;
}

// Where the filter does not fit x and y, or an array is too large, nothing with channels.
Convolution MakeConvolution(Kind kind, DType dtype, int batch, const Filter& f, int stride, const Image& x,
                            const Image& y) {
  Convolution c = {kind, dtype, batch, x, y, f.h, f.w, stride, f.top, f.left, 0, 0, 0};
  c.pad_bottom = (y.h - 1) * stride + f.h - x.h - f.top;
  c.pad_right = (y.w - 1) * stride + f.w - x.w - f.left;
  const bool fits = Fits(batch, x) && Fits(batch, y) && Fits(y.channels, {f.h, f.w, x.channels});
  return fits && c.pad_bottom >= 0 && c.pad_right >= 0 ? c : Convolution{};
}
bool Exists(const Convolution& c) {
  return c.batch > 0 && c.x.h > 0 && c.x.w > 0 && c.y.h > 0 && c.y.w > 0 && c.x.channels > 0 && c.y.channels > 0;
}

bool MaskIsDense(const GemmArgs& g, int result) {
  const int64_t row = static_cast<int64_t>(g.out_w) * g.result[result].channels;
  return result == 0 || (g.mask_row_stride == row && g.mask_image_stride == g.out_h * row);
}

struct GemmPlan {
  bool serves = false;
  Filter filter;
  Convolution part[2] = {};  // one a result; none where that has no channels
  int epilogue[2] = {};      // what is to be done to it; what the part's own lacks, in a pass that follows
  int64_t bytes = 0;         // of cuDNN's workspace
};

GemmPlan PlanGemm(DType dtype, const GemmArgs& g, int config, bool may_plan) {
  GemmPlan plan;
  plan.filter = FilterOf(g);
  const bool single = g.lists == 1, quad = g.lists == 4 && g.transposed && g.stride == 1 && g.results == 1;
  const bool pools = g.pooled == nullptr || (single && g.results == 1);
  if (!Takes(dtype, g.vector) || plan.filter.taps() == 0 || (!single && !quad) || !pools || !HasSource(g) ||
      !HasDenseResults(g)) {
    return plan;
  }
  const Image source = SourceOf(g);
  for (int r = 0; r < g.results; ++r) {
    const int n = g.results == 1 ? g.n : g.result[r].channels;
    if (n == 0) continue;
    Convolution& c = plan.part[r];
    c = single ? MakeConvolution(Kind::kForward, dtype, g.batch, plan.filter, g.stride, source, {g.out_h, g.out_w, n})
               : MakeConvolution(Kind::kInputGradient, dtype, g.batch, plan.filter, 2, {2 * g.out_h, 2 * g.out_w, n},
                                 source);
    if (!Exists(c)) return plan;
    const bool masks = g.result[r].mask != nullptr;
    const int epilogue = (g.bias != nullptr ? kBias : 0) | (g.relu ? kRelu : 0);
    plan.epilogue[r] = epilogue | (masks ? kMask : 0);
    c.epilogue = epilogue | (masks && MaskIsDense(g, r) ? kMask : 0);
    // Whether it is fused is the same for all of a graph's plans.
    if (c.epilogue != 0 && PlanBytes(c, -1, may_plan) < 0) c.epilogue = 0;
    const int64_t bytes = PlanBytes(c, config, may_plan);
    if (bytes < 0) return plan;
    plan.bytes = std::max(plan.bytes, bytes);
  }
  plan.serves = true;
  return plan;
}

Convolution WgradConvolution(DType dtype, const WgradArgs& g, const Filter& filter) {
  if (!Takes(dtype, g.vector) || filter.taps() == 0 || !HasSource(g)) return {};
  return MakeConvolution(Kind::kWeightGradient, dtype, g.batch, filter, g.stride, SourceOf(g), {g.out_h, g.out_w, g.n});
}

struct Space {
  Workspace layout;
  void *source = nullptr, *filter, *scratch;

  template <typename Args>
  Space(void* base, DType dtype, const Args& g, int taps, int64_t scratch_bytes) : layout(base) {
    const Image image = SourceOf(g);
    const int64_t pixels = static_cast<int64_t>(g.batch) * image.h * image.w;
    if (g.sources == 2) source = layout.Take(pixels * image.channels * SizeOf(dtype));
    filter = layout.Take(static_cast<int64_t>(taps) * image.channels * g.n * SizeOf(dtype));
    scratch = layout.Take(scratch_bytes);
  }
};

// The source as one dense array, in `*data`.
template <typename Args>
int Gather(void* stream, const Args& g, void* to, const void** data) {
  *data = g.sources == 2 ? to : g.source[0].data;
  return g.sources == 2 ? Concatenate(stream, g.source, g.batch, g.source_h, g.source_w, to) : 0;
}

// From the weights to [n, tap, c], for four lists to [c, tap, n].
int ReorderWeights(void* stream, const GemmArgs& g, const Filter& filter, void* to) {
  const int channels = SourceOf(g).channels, taps = filter.taps(), inner = g.lists == 1 ? channels : g.n;
  Matrices m = {taps, g.transposed ? g.n : channels, g.transposed ? channels : g.n, {g.ld, {}}, {}};
  m.to.ld = static_cast<int64_t>(taps) * inner;
  for (int t = 0; t < taps; ++t) m.from.offset[t] = filter.index[t] * g.tap_stride, m.to.offset[t] = t * inner;
  return g.transposed && g.lists == 1 ? Copy(stream, m, g.weights, to) : Transpose(stream, m, g.weights, to);
}

// From [n, tap, c] to [tap, c, n].
int ReorderGradient(void* stream, const WgradArgs& g, const Filter& filter, const void* from) {
  const int channels = SourceOf(g).channels, taps = filter.taps();
  Matrices m = {taps, g.n, channels, {static_cast<int64_t>(taps) * channels, {}}, {g.n, {}}};
  for (int t = 0; t < taps; ++t) {
    m.from.offset[t] = t * channels, m.to.offset[t] = static_cast<int64_t>(filter.index[t]) * channels * g.n;
  }
  return Transpose(stream, m, from, g.dweights);
}

}  // namespace

int64_t GemmWorkspaceBytes(DType dtype, const GemmArgs& g, int config) {
  const GemmPlan plan = PlanGemm(dtype, g, config, /*may_plan=*/true);
  return plan.serves ? static_cast<int64_t>(Space(nullptr, dtype, g, plan.filter.taps(), plan.bytes).layout.bytes())
                     : -1;
}

int Gemm(void* stream, DType dtype, const GemmArgs& g, int config, void* workspace) {
  const GemmPlan plan = PlanGemm(dtype, g, config, /*may_plan=*/false);
  if (!plan.serves) return cudaErrorNotSupported;
  const Space space(workspace, dtype, g, plan.filter.taps(), plan.bytes);
  const void* source;
  UNET_FAST_CUDA_RETURN_IF_ERROR(Gather(stream, g, space.source, &source));
  UNET_FAST_CUDA_RETURN_IF_ERROR(ReorderWeights(stream, g, plan.filter, space.filter));
  int column = 0;  // of the result's first channel
  for (int r = 0; r < g.results; ++r) {
    const Convolution& c = plan.part[r];
    if (!Exists(c)) continue;
    const GemmResult& to = g.result[r];
    const void* bias = g.bias == nullptr ? nullptr : At(g.bias, dtype, column);
    const void* filter = At(space.filter, dtype, static_cast<int64_t>(column) * plan.filter.taps() * c.x.channels);
    const Arrays arrays = c.kind == Kind::kForward ? Arrays{source, filter, to.data, bias, to.mask}
                                                   : Arrays{to.data, space.filter, source, bias, to.mask};
    UNET_FAST_CUDA_RETURN_IF_ERROR(Run(stream, c, config, arrays, space.scratch));
    if (const int left = plan.epilogue[r] & ~c.epilogue; left != 0) {
      const int64_t row = static_cast<int64_t>(c.result().w) * c.result().channels;
      const bool dense = MaskIsDense(g, r);
      const FinishArgs finish = {left,
                                 to.data,
                                 bias,
                                 to.mask,
                                 dense ? c.result().h * row : g.mask_image_stride,
                                 dense ? row : g.mask_row_stride};
      UNET_FAST_CUDA_RETURN_IF_ERROR(Finish(stream, dtype, g.batch, c.result(), finish));
    }
    column += c.result().channels;
  }
  if (g.pooled == nullptr) return 0;
  return MaxPool2D(stream, dtype, g.batch, g.out_h, g.out_w, g.n, g.result[0].data, g.pooled);
}

int64_t WgradWorkspaceBytes(DType dtype, const WgradArgs& g, int config) {
  const Filter filter = Rectangle(g.taps.tap, g.taps.count);
  const Convolution c = WgradConvolution(dtype, g, filter);
  const int64_t bytes = Exists(c) ? PlanBytes(c, config, /*may_plan=*/true) : -1;
  return bytes < 0 ? -1 : static_cast<int64_t>(Space(nullptr, dtype, g, filter.taps(), bytes).layout.bytes());
}

int Wgrad(void* stream, DType dtype, const WgradArgs& g, int config, void* workspace) {
  const Filter filter = Rectangle(g.taps.tap, g.taps.count);
  const Convolution c = WgradConvolution(dtype, g, filter);
  const int64_t bytes = Exists(c) ? PlanBytes(c, config, /*may_plan=*/false) : -1;
  if (bytes < 0) return cudaErrorNotSupported;
  const Space space(workspace, dtype, g, filter.taps(), bytes);
  const void* source;
  UNET_FAST_CUDA_RETURN_IF_ERROR(Gather(stream, g, space.source, &source));
  UNET_FAST_CUDA_RETURN_IF_ERROR(Run(stream, c, config, {source, space.filter, g.dz, nullptr, nullptr}, space.scratch));
  return ReorderGradient(stream, g, filter, space.filter);
}

int64_t Version() { return LibraryVersion(); }

}  // namespace unet_fast::gpu::cudnn
