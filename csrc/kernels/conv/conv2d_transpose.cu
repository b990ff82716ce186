// conv2d_transpose_bias_relu on a GPU, stride 2. Output pixels of one parity see only some taps - even rows
// r = 0 of input row i and, in a 3x3 kernel, r = 2 of row i - 1; odd rows r = 1 of row i - and columns likewise. So the
// forward pass is four small convolutions of x, one launch with a list of taps each: nine products a pixel of x, none
// with a zero. Its input gradient is a convolution of dz with stride 2.
#include "common/side_stream.h"
#include "conv/gemm.h"
#include "conv/gpu.h"
#include "conv/mask.h"
#include "conv/workspace.h"

namespace unet_fast::gpu {
namespace {

bool IsVector(const Conv2DTransposeProblem& p) { return p.channels % kPack == 0 && p.filters % kPack == 0; }

GemmSource XSource(const Conv2DTransposeProblem& p, const void* x) {
  return {x, p.height * p.width * p.channels, static_cast<int>(p.width * p.channels), static_cast<int>(p.channels)};
}
GemmSource DzSource(const Conv2DTransposeProblem& p, const void* dz) {
  return {dz, 4 * p.height * p.width * p.filters, static_cast<int>(2 * p.width * p.filters),
          static_cast<int>(p.filters)};
}

TapList AllTaps(const Conv2DTransposeProblem& p) {
  TapList taps;
  for (int64_t r = 0; r < p.kernel_size; ++r) {
    for (int64_t s = 0; s < p.kernel_size; ++s) taps.Add(r, s, r * p.kernel_size + s);
  }
  return taps;
}

GemmArgs Forward(const Conv2DTransposeProblem& p, const Conv2DTransposeForward& d) {
  GemmArgs g;
  g.source[0] = XSource(p, d.x);
  g.source_h = p.height, g.source_w = p.width;
  g.weights = d.kernel, g.tap_stride = p.filters * p.channels, g.ld = p.channels, g.transposed = true;
  g.vector = IsVector(p);
  g.batch = p.batch, g.out_h = p.height, g.out_w = p.width, g.n = p.filters;
  const int64_t y_row = 2 * p.width * p.filters;
  g.lists = 4;  // parities (0, 0), (0, 1), (1, 0), (1, 1): in a 3x3 kernel four, two, two taps and one
  for (int64_t parity = 0; parity < 4; ++parity) {
    const int64_t a = parity / 2, b = parity % 2;
    TapList& taps = g.taps[parity];
    for (int64_t r = a; r < p.kernel_size; r += 2) {
      for (int64_t s = b; s < p.kernel_size; s += 2) taps.Add(-(r / 2), -(s / 2), r * p.kernel_size + s);
    }
    taps.result_offset = a * y_row + b * p.filters;
  }
  g.result[0] = {
      d.y, nullptr, 2 * p.height * y_row, 2 * y_row, static_cast<int>(2 * p.filters), static_cast<int>(p.filters)};
  g.bias = d.bias, g.relu = p.relu;
  return g;
}

// dx[i] = sum over r of dz[2 i + r] kernel[r]
GemmArgs Dgrad(const Conv2DTransposeProblem& p, const Conv2DTransposeGradient& d, const void* dz) {
  GemmArgs g;
  g.source[0] = DzSource(p, dz);
  g.source_h = 2 * p.height, g.source_w = 2 * p.width, g.stride = 2;
  g.weights = d.kernel, g.tap_stride = p.filters * p.channels, g.ld = p.channels, g.vector = IsVector(p);
  g.batch = p.batch, g.out_h = p.height, g.out_w = p.width, g.n = p.channels;
  g.taps[0] = AllTaps(p);
  const GemmSource x = XSource(p, d.dx);
  g.result[0] = {d.dx, p.input_is_relu ? d.x : nullptr, x.image_stride, x.row_stride, x.channels, x.channels};
  return g;
}

// dkernel[r, f, c] = sum over i of dz[2 i + r, f] x[i, c]: dz takes the part of the input, x that of the gradient.
WgradArgs Wgrad(const Conv2DTransposeProblem& p, const Conv2DTransposeGradient& d, const void* dz) {
  WgradArgs w;
  w.source[0] = DzSource(p, dz);
  w.source_h = 2 * p.height, w.source_w = 2 * p.width, w.stride = 2;
  w.dz = d.x, w.batch = p.batch, w.out_h = p.height, w.out_w = p.width, w.n = p.channels;
  w.taps = AllTaps(p), w.vector = IsVector(p);
  w.dweights = d.dkernel;
  return w;
}

// Where it matters alone which arrays there are: all of them, aligned.
alignas(16) char kSome[16];
constexpr Conv2DTransposeForward kAllForward = {kSome, kSome, kSome, kSome};
constexpr Conv2DTransposeGradient kAll = {kSome, kSome, kSome, kSome, kSome, kSome, kSome};

struct GradWorkspace {
  Workspace layout;
  void* dz = nullptr;
  float *bias_slabs, *slabs;
  void* gemm = nullptr;

  GradWorkspace(void* base, const Conv2DTransposeProblem& p, const Conv2DTuning& tuning) : layout(base) {
    const int64_t pixels = 4 * p.batch * p.height * p.width;
    if (p.relu && !p.dy_is_masked) dz = layout.Take(pixels * p.filters * SizeOf(p.dtype));
    bias_slabs = static_cast<float*>(layout.Take(MaskSlabBytes(pixels, p.filters)));
    // The two products run at once.
    gemm = layout.Take(GemmWorkspaceBytes(p.dtype, Dgrad(p, kAll, kSome), tuning));
    slabs = static_cast<float*>(layout.Take(WgradWorkspaceBytes(p.dtype, Wgrad(p, kAll, kSome), tuning)));
  }
};

}  // namespace

size_t Conv2DTransposeBiasReluWorkspaceBytes(const Conv2DTransposeProblem& p, const Conv2DTuning& tuning) {
  if (p.dtype == DType::kFloat32 || p.batch == 0) return 0;
  return GemmWorkspaceBytes(p.dtype, Forward(p, kAllForward), tuning);
}

int Conv2DTransposeBiasRelu(void* stream, const Conv2DTransposeProblem& p, const Conv2DTransposeForward& d,
                            void* workspace, const Conv2DTuning& tuning) {
  if (p.dtype == DType::kFloat32) return cudaErrorNotSupported;
  if (p.batch == 0) return 0;
  return ImplicitGemm(stream, p.dtype, Forward(p, d), tuning, workspace);
}

size_t Conv2DTransposeBiasReluGradWorkspaceBytes(const Conv2DTransposeProblem& p, const Conv2DTuning& tuning) {
  return GradWorkspace(nullptr, p, tuning).layout.bytes();
}

int Conv2DTransposeBiasReluGrad(void* stream, const Conv2DTransposeProblem& p, const Conv2DTransposeGradient& d,
                                void* workspace, const Conv2DTuning& tuning) {
  if (p.dtype == DType::kFloat32) return cudaErrorNotSupported;
  if (p.batch == 0) return ZeroWeightGradient(stream, d.dkernel, p.kernel_elements(), d.dbias, p.filters);
  const bool masks = p.relu && !p.dy_is_masked;
  const GradWorkspace space(workspace, p, tuning);
  const void* dz = masks ? space.dz : d.dy;
  MaskArgs m = {};
  m.dy = d.dy, m.y = d.y, m.batch = p.batch, m.h = 2 * p.height, m.w = 2 * p.width, m.channels = p.filters;
  m.dy_h = m.h, m.dy_w = m.w;
  m.relu = masks, m.dz = space.dz, m.slabs = space.bias_slabs, m.dbias = d.dbias;
  if (masks) UNET_FAST_CUDA_RETURN_IF_ERROR(MaskGradient(stream, p.dtype, m));

  const auto weight_gradient = [&](void* where) {
    if (!masks) UNET_FAST_CUDA_RETURN_IF_ERROR(MaskGradient(where, p.dtype, m));  // the bias gradient alone
    WgradArgs w = Wgrad(p, d, dz);
    w.slabs = space.slabs;
    return Wgrad(where, p.dtype, w, tuning);
  };
  if (d.dx == nullptr) return weight_gradient(stream);
  return AtOnce(
      stream, [&](void* where) { return ImplicitGemm(where, p.dtype, Dgrad(p, d, dz), tuning, space.gemm); },
      weight_gradient);
}

std::vector<ProductChoice> Conv2DTransposeChoices(const Conv2DTransposeProblem& p, int capability) {
  std::vector<ProductChoice> choices;
  for (const Product& product : Products(p, kAllForward, kAll, kSome)) choices.push_back(Describe(product, capability));
  return choices;
}

std::vector<Product> Products(const Conv2DTransposeProblem& p, const Conv2DTransposeForward& forward,
                              const Conv2DTransposeGradient& gradient, const void* dz) {
  return {{"forward", p.dtype, false, Forward(p, forward), {}},
          {"input gradient", p.dtype, false, Dgrad(p, gradient, dz), {}},
          {"weight gradient", p.dtype, true, {}, Wgrad(p, gradient, dz)}};
}

}  // namespace unet_fast::gpu
