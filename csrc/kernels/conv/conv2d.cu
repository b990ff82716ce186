// conv2d_bias_relu on a GPU: which kernels a problem takes, and with what arguments.
#include <algorithm>

#include "common/side_stream.h"
#include "conv/direct.h"
#include "conv/gemm.h"
#include "conv/gpu.h"
#include "conv/mask.h"
#include "conv/workspace.h"

namespace unet_fast::gpu {
namespace {

bool IsVector(const Conv2DProblem& p) {
  return p.channels % kPack == 0 && p.skip_channels % kPack == 0 && p.filters % kPack == 0;
}

// x, or its gradient; the window of skip that lies under it, and the gradient of that.
GemmSource XSource(const Conv2DProblem& p, const void* x) {
  return {x, p.height * p.width * p.channels, static_cast<int>(p.width * p.channels), static_cast<int>(p.channels)};
}
GemmSource SkipSource(const Conv2DProblem& p, const void* skip) {
  const int64_t crop = (p.crop_top() * p.skip_width + p.crop_left()) * p.skip_channels;
  return {At(skip, p.dtype, crop), p.skip_height * p.skip_width * p.skip_channels,
          static_cast<int>(p.skip_width * p.skip_channels), static_cast<int>(p.skip_channels)};
}
GemmSource DskipSource(const Conv2DProblem& p, const void* dskip) {
  return {dskip, p.height * p.width * p.skip_channels, static_cast<int>(p.width * p.skip_channels),
          static_cast<int>(p.skip_channels)};
}
GemmSource DzSource(const Conv2DProblem& p, const void* dz) {
  return {dz, p.out_height() * p.out_width() * p.filters, static_cast<int>(p.out_width() * p.filters),
          static_cast<int>(p.filters)};
}
GemmResult Result(const GemmSource& like, void* data, const void* mask) {
  return {data, mask, like.image_stride, like.row_stride, like.channels, like.channels};
}

// Kernel row r reads input row i + r - pad; its gradient reads dz's row i + pad - r.
TapList Taps(const Conv2DProblem& p, bool backwards) {
  TapList taps;
  for (int64_t r = 0; r < p.kernel_size; ++r) {
    for (int64_t s = 0; s < p.kernel_size; ++s) {
      const int64_t row = r - p.pad(), col = s - p.pad();
      taps.Add(backwards ? -row : row, backwards ? -col : col, r * p.kernel_size + s);
    }
  }
  return taps;
}

// Those of the two inputs that have channels, which are x's unless it has none; returns how many.
int Sources(const Conv2DProblem& p, const void* x, const void* skip, GemmSource* sources) {
  int count = 0;
  if (p.channels > 0 || p.skip_channels == 0) sources[count++] = XSource(p, x);
  if (p.skip_channels > 0) sources[count++] = SkipSource(p, skip);
  return count;
}

GemmArgs Forward(const Conv2DProblem& p, const Conv2DForward& d) {
  GemmArgs g;
  g.sources = Sources(p, d.x, d.skip, g.source);
  g.source_h = p.height, g.source_w = p.width;
  g.weights = d.kernel, g.tap_stride = p.in_channels() * p.filters, g.ld = p.filters;
  g.vector = IsVector(p);
  g.batch = p.batch, g.out_h = p.out_height(), g.out_w = p.out_width(), g.n = p.filters;
  g.taps[0] = Taps(p, /*backwards=*/false);
  g.result[0] = Result(DzSource(p, d.y), d.y, nullptr);
  g.bias = d.bias, g.relu = p.relu;
  if (p.pool && g.out_h > 1 && g.out_w > 1) g.pooled = d.pooled;
  return g;
}

GemmArgs Dgrad(const Conv2DProblem& p, const Conv2DGradient& d, const void* dz) {
  GemmArgs g;
  g.source[0] = DzSource(p, dz);
  g.source_h = p.out_height(), g.source_w = p.out_width();
  g.transposed = true, g.vector = IsVector(p);
  g.tap_stride = p.in_channels() * p.filters, g.ld = p.filters;
  g.batch = p.batch, g.out_h = p.height, g.out_w = p.width;
  g.taps[0] = Taps(p, /*backwards=*/true);
  // Only the columns that are wanted.
  g.result[0] = d.dx != nullptr ? Result(XSource(p, d.x), d.dx, p.mask_dx ? d.x : nullptr) : GemmResult{};
  if (d.dskip != nullptr && p.skip_channels > 0) {
    const GemmSource skip = SkipSource(p, d.skip);
    g.results = 2;
    g.result[1] = Result(DskipSource(p, d.dskip), d.dskip, p.mask_dskip ? skip.data : nullptr);
    g.mask_image_stride = skip.image_stride, g.mask_row_stride = skip.row_stride;
  }
  g.whole_n = p.in_channels();
  g.n = (d.dx != nullptr ? p.channels : 0) + (d.dskip != nullptr ? p.skip_channels : 0);
  g.weights = At(d.kernel, p.dtype, d.dx != nullptr ? 0 : p.channels * p.filters);
  return g;
}

WgradArgs Wgrad(const Conv2DProblem& p, const Conv2DGradient& d, const void* dz) {
  WgradArgs w;
  w.sources = Sources(p, d.x, d.skip, w.source);
  w.source_h = p.height, w.source_w = p.width;
  w.dz = dz, w.batch = p.batch, w.out_h = p.out_height(), w.out_w = p.out_width(), w.n = p.filters;
  w.taps = Taps(p, /*backwards=*/false), w.vector = IsVector(p);
  w.dweights = d.dkernel;
  return w;
}

// Whether dz is another array than dy.
bool StoresDz(const Conv2DProblem& p) {
  const bool whole = p.dy_height == p.out_height() && p.dy_width == p.out_width();
  return (p.relu && !p.dy_is_masked) || p.pool || !whole;
}

// Where it matters alone which arrays there are: all of them, aligned.
alignas(16) char kSome[16];
constexpr Conv2DForward kAllForward = {kSome, kSome, kSome, kSome, kSome, kSome};
constexpr Conv2DGradient kAll = {kSome, kSome, kSome, kSome, kSome, kSome, kSome, kSome, kSome, kSome};

// Whichever of the two results are wanted: an engine may serve one of them alone.
size_t DgradWorkspaceBytes(const Conv2DProblem& p, const Conv2DTuning& tuning) {
  Conv2DGradient only_x = kAll, only_skip = kAll;
  only_x.dskip = nullptr, only_skip.dx = nullptr;
  size_t bytes = GemmWorkspaceBytes(p.dtype, Dgrad(p, kAll, kSome), tuning);
  if (p.skip_channels > 0) {
    for (const Conv2DGradient& d : {only_x, only_skip}) {
      bytes = std::max(bytes, GemmWorkspaceBytes(p.dtype, Dgrad(p, d, kSome), tuning));
    }
  }
  return bytes;
}

struct GradWorkspace {
  Workspace layout;
  void* dz = nullptr;
  float *bias_slabs, *slabs;
  void* gemm = nullptr;

  GradWorkspace(void* base, const Conv2DProblem& p, const Conv2DTuning& tuning) : layout(base) {
    const int64_t pixels = p.batch * p.out_height() * p.out_width();
    const WgradArgs wgrad = Wgrad(p, kAll, kSome);
    if (StoresDz(p)) dz = layout.Take(pixels * p.filters * SizeOf(p.dtype));
    bias_slabs = static_cast<float*>(layout.Take(BiasSlabBytes(p.dtype, wgrad, tuning)));
    if (HasFewFilters(p)) {
      slabs = static_cast<float*>(layout.Take(FewFiltersGradSlabBytes(p)));
      return;
    }
    // The two products run at once.
    gemm = layout.Take(DgradWorkspaceBytes(p, tuning));
    slabs = static_cast<float*>(
        layout.Take(HasFewChannels(p) ? FewChannelsGradSlabBytes(p) : WgradWorkspaceBytes(p.dtype, wgrad, tuning)));
  }
};

}  // namespace

size_t Conv2DBiasReluWorkspaceBytes(const Conv2DProblem& p, const Conv2DTuning& tuning) {
  if (p.dtype == DType::kFloat32 || p.batch == 0 || HasFewFilters(p) || HasFewChannels(p)) return 0;
  return GemmWorkspaceBytes(p.dtype, Forward(p, kAllForward), tuning);
}

int Conv2DBiasRelu(void* stream, const Conv2DProblem& p, const Conv2DForward& d, void* workspace,
                   const Conv2DTuning& tuning) {
  if (p.dtype == DType::kFloat32) return cudaErrorNotSupported;
  if (p.batch == 0) return 0;
  if (HasFewFilters(p)) return FewFiltersForward(stream, p, d);
  if (HasFewChannels(p)) return FewChannelsForward(stream, p, d);
  return ImplicitGemm(stream, p.dtype, Forward(p, d), tuning, workspace);
}

size_t Conv2DBiasReluGradWorkspaceBytes(const Conv2DProblem& p, const Conv2DTuning& tuning) {
  return GradWorkspace(nullptr, p, tuning).layout.bytes();
}

int Conv2DBiasReluGrad(void* stream, const Conv2DProblem& p, const Conv2DGradient& d, void* workspace,
                       const Conv2DTuning& tuning) {
  if (p.dtype == DType::kFloat32) return cudaErrorNotSupported;
  if (p.batch == 0) return ZeroWeightGradient(stream, d.dkernel, p.kernel_elements(), d.dbias, p.filters);
  const bool stores_dz = StoresDz(p);
  const GradWorkspace space(workspace, p, tuning);
  const void* dz = stores_dz ? space.dz : d.dy;
  if (stores_dz) {
    MaskArgs m = {};
    m.dy = d.dy, m.dpooled = p.pool ? d.dpooled : nullptr, m.y = d.y;
    m.batch = p.batch, m.h = p.out_height(), m.w = p.out_width(), m.channels = p.filters;
    m.dy_h = p.dy_height, m.dy_w = p.dy_width, m.dy_top = p.dy_top(), m.dy_left = p.dy_left();
    // What comes back through the pool may not be masked, whatever dy is.
    m.relu = p.relu && (p.pool || !p.dy_is_masked), m.dz = space.dz, m.slabs = space.bias_slabs, m.dbias = d.dbias;
    UNET_FAST_CUDA_RETURN_IF_ERROR(MaskGradient(stream, p.dtype, m));
  }

  void* const dbias = stores_dz ? nullptr : d.dbias;  // still to be computed
  if (HasFewFilters(p)) {
    return FewFiltersGrad(stream, p, d.x, dz, d.kernel, d.dx, d.dkernel, dbias, space.slabs);
  }
  const auto weight_gradient = [&](void* where) {
    if (HasFewChannels(p)) return FewChannelsGrad(where, p, d.x, dz, d.dkernel, dbias, space.slabs);
    WgradArgs w = Wgrad(p, d, dz);
    w.slabs = space.slabs, w.bias_slabs = space.bias_slabs, w.dbias = dbias;
    return Wgrad(where, p.dtype, w, tuning);
  };
  if (d.dx == nullptr && (d.dskip == nullptr || p.skip_channels == 0)) return weight_gradient(stream);
  return AtOnce(
      stream, [&](void* where) { return ImplicitGemm(where, p.dtype, Dgrad(p, d, dz), tuning, space.gemm); },
      weight_gradient);
}

std::vector<ProductChoice> Conv2DChoices(const Conv2DProblem& p, int capability) {
  const std::string direct = HasFewFilters(p) ? "1x1 to few filters" : "few channels";
  if (HasFewFilters(p) || HasFewChannels(p)) {
    const ProductChoice gradient = {"weight gradient", "direct", direct};
    std::vector<ProductChoice> choices = {{"forward", "direct", direct}, gradient};
    if (HasFewFilters(p)) choices.insert(choices.begin() + 1, {"input gradient", "direct", direct});
    return choices;
  }
  std::vector<ProductChoice> choices;
  for (const Product& product : Products(p, kAllForward, kAll, kSome)) choices.push_back(Describe(product, capability));
  return choices;
}

std::vector<Product> Products(const Conv2DProblem& p, const Conv2DForward& forward, const Conv2DGradient& gradient,
                              const void* dz) {
  if (HasFewFilters(p) || HasFewChannels(p)) return {};
  return {{"forward", p.dtype, false, Forward(p, forward), {}},
          {"input gradient", p.dtype, false, Dgrad(p, gradient, dz), {}},
          {"weight gradient", p.dtype, true, {}, Wgrad(p, gradient, dz)}};
}

}  // namespace unet_fast::gpu
