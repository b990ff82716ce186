// conv2d_bias_relu on the CPU. Few channels in float32 run on the caller's arrays. Where Eigen is the faster one, or a
// type calls for it, inputs are copied together for a few images at a time, so that temporaries do not grow with the
// batch.
#include "conv/cpu/conv2d.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "conv/cpu/buffers.h"
#include "conv/cpu/primitives.h"
#include "pool/max_pool2d.h"

namespace unet_fast::cpu {
namespace {

// Below this many input channels the weight gradient is faster as a matrix product over explicit patches.
constexpr int64_t kPatchesBelow = 8;

// The part of a float32 skip tensor that the convolution sees.
View<const float> CroppedSkip(const Conv2DProblem& p, const float* skip) {
  auto view = View<const float>::Contiguous(skip, p.skip_height, p.skip_width, p.skip_channels);
  if (skip != nullptr) view.data = view.At(0, p.crop_top(), p.crop_left());
  view.h = p.height, view.w = p.width;
  return view;
}

// [x, skip] of `n` images from `first` on as one float32 array [n, height + 2 pad, width + 2 pad, in_channels].
void GatherInputs(ThreadPool& pool, const Conv2DProblem& p, const void* x, const void* skip, int64_t first, int64_t n,
                  int64_t pad, float* target) {
  Gather g;
  g.type = p.dtype, g.n = n, g.rows = p.height, g.cols = p.width, g.target = target, g.pad = pad;
  g.grid_h = p.height + 2 * pad, g.grid_w = p.width + 2 * pad, g.grid_c = p.in_channels();
  g.source = At(x, p.dtype, first * p.height * p.width * p.channels);
  g.h = p.height, g.w = p.width, g.c = p.channels, g.top = 0, g.left = 0, g.channel = 0;
  GatherToGrid(pool, g);
  if (p.skip_channels == 0) return;
  g.source = At(skip, p.dtype, first * p.skip_height * p.skip_width * p.skip_channels);
  g.h = p.skip_height, g.w = p.skip_width, g.c = p.skip_channels, g.top = p.crop_top(), g.left = p.crop_left();
  g.channel = p.channels;
  GatherToGrid(pool, g);
}

// Splits dinput [n, height, width, in_channels] into dx and dskip, masked where asked for.
void ScatterInputGradient(ThreadPool& pool, const Conv2DProblem& p, const Conv2DGradient& d, int64_t first, int64_t n,
                          const float* dinput) {
  // `input` is [batch, h, w, c], of which the convolution sees the part at (top, left).
  const auto scatter = [&](const void* input, void* target, int64_t h, int64_t w, int64_t c, int64_t top, int64_t left,
                           int64_t channel, bool masked) {
    if (target == nullptr || c == 0) return;
    const int64_t count = p.width * c;
    ParallelFor(pool, n * p.height, [&](int64_t row) {
      std::vector<float> out(count), mask;
      const float* source = dinput + row * p.width * p.in_channels() + channel;
      for (int64_t j = 0; j < p.width; ++j) std::copy_n(source + j * p.in_channels(), c, out.data() + j * c);
      if (masked) {
        mask.resize(count);
        const int64_t input_row = (first + row / p.height) * h + top + row % p.height;
        GetPrimitives().to_float(At(input, p.dtype, (input_row * w + left) * c), p.dtype, mask.data(), count);
        for (int64_t k = 0; k < count; ++k) out[k] = mask[k] > 0.0f ? out[k] : 0.0f;
      }
      GetPrimitives().from_float(out.data(), p.dtype, At(target, p.dtype, (first * p.height + row) * count), count);
    });
  };
  scatter(d.x, d.dx, p.height, p.width, p.channels, 0, 0, 0, p.mask_dx);
  scatter(d.skip, d.dskip, p.skip_height, p.skip_width, p.skip_channels, p.crop_top(), p.crop_left(), p.channels,
          p.mask_dskip);
}

// How the gradient of one problem is computed.
struct GradientPlan {
  bool float32, want_dx;
  bool dz_in_place;                // dy is dz already
  bool patches;                    // the weight gradient is that of a 1x1 convolution of explicit patches
  bool direct_wgrad;               // else Eigen's, for which x is padded and dz lies in the grid of the padded x
  bool transposed_wgrad;           // of a 1x1 kernel: x and dz change places, and so do the gradient's two channels
  bool x_in_place;                 // the weight gradient reads x and skip where they are
  bool dx_in_place;                // dx and dskip are written where they belong
  int64_t grid_h, grid_w, grid_c;  // of the x that the weight gradient reads; dz has grid_h and grid_w too
  int64_t x_size, dz_size, dinput_size;

  GradientPlan(const Conv2DProblem& p, const Conv2DGradient& d) {
    const int64_t k = p.kernel_size;
    float32 = p.dtype == DType::kFloat32;
    want_dx = d.dx != nullptr || d.dskip != nullptr;
    patches = k > 1 && p.in_channels() < kPatchesBelow && p.skip_channels == 0;
    grid_c = patches ? k * k * p.in_channels() : p.in_channels();
    WgradArgs w;
    w.x.c = std::max(grid_c - p.skip_channels, p.skip_channels), w.dz.c = p.filters;
    direct_wgrad = GetPrimitives().direct_wgrad_serves(w);
    const int64_t pad = direct_wgrad ? 0 : 2 * p.pad();
    grid_h = patches ? p.out_height() : direct_wgrad ? p.out_height() : p.height + pad;
    grid_w = patches ? p.out_width() : direct_wgrad ? p.out_width() : p.width + pad;
    transposed_wgrad = float32 && k == 1 && p.skip_channels == 0 && !direct_wgrad && TransposedServes(p);
    direct_wgrad |= transposed_wgrad;
    x_in_place = float32 && !patches && (direct_wgrad || (p.pad() == 0 && p.skip_channels == 0));
    dx_in_place =
        float32 && (p.skip_channels == 0 || (DirectServes(p, p.channels) && DirectServes(p, p.skip_channels)));
    dz_in_place = float32 && !p.pool && (!p.relu || p.dy_is_masked) && grid_h == p.dy_height && grid_w == p.dy_width;
    dz_size = grid_h * grid_w * p.filters;
    // Gathered for the direct kernel, x is not padded.
    x_size = direct_wgrad && !patches ? p.height * p.width * grid_c : grid_h * grid_w * grid_c;
    dinput_size = p.height * p.width * p.in_channels();
  }
  static bool TransposedServes(const Conv2DProblem& p) {
    WgradArgs w;
    w.x.c = p.filters, w.dz.c = p.channels;
    return GetPrimitives().direct_wgrad_serves(w);
  }
  static bool DirectServes(const Conv2DProblem& p, int64_t channels) {
    ConvArgs a;
    a.kh = a.kw = p.kernel_size, a.x[0].c = p.filters, a.y.c = channels;
    return GetPrimitives().direct_conv_serves(a);
  }
};

// dx and dskip from dz by the rotated kernel [k, k, filters, in_channels].
void InputGradient(ThreadPool& pool, const Conv2DProblem& p, const Conv2DGradient& d, const GradientPlan& plan,
                   int64_t first, int64_t n, const float* dz, const float* rotated, float* dinput) {
  const int64_t k = p.kernel_size;
  ConvArgs a;
  a.n = n, a.x[0] = View<const float>::Contiguous(dz, plan.grid_h, plan.grid_w, p.filters);
  a.kernel = rotated, a.kh = a.kw = k, a.filters = p.in_channels();
  a.pad_top = a.pad_left = k - 1 - p.pad();  // full correlation
  if (!plan.dx_in_place) {
    a.y = View<float>::Contiguous(dinput, p.height, p.width, p.in_channels());
    Conv(pool, a);
    ScatterInputGradient(pool, p, d, first, n, dinput);
    return;
  }
  if (d.dx != nullptr) {
    const int64_t offset = first * p.height * p.width * p.channels;
    a.y = View<float>::Contiguous(static_cast<float*>(d.dx) + offset, p.height, p.width, p.channels);
    if (p.mask_dx) {
      a.mask = View<const float>::Contiguous(static_cast<const float*>(d.x) + offset, p.height, p.width, p.channels);
    }
    Conv(pool, a);
  }
  if (d.dskip != nullptr) {
    float* dskip = static_cast<float*>(d.dskip) + first * p.height * p.width * p.skip_channels;
    a.kernel += p.channels;
    a.y = View<float>::Contiguous(dskip, p.height, p.width, p.skip_channels);
    a.mask = {};
    if (p.mask_dskip) {
      const int64_t offset = first * p.skip_height * p.skip_width * p.skip_channels;
      a.mask = CroppedSkip(p, static_cast<const float*>(d.skip) + offset);
    }
    GetPrimitives().direct_conv(pool, a);
  }
}

// dkernel [slabs, k, k, in_channels, filters]: the weight gradient of `n` images from `first` on, added to that of
// those before.
void WeightGradient(ThreadPool& pool, const Conv2DProblem& p, const Conv2DGradient& d, const GradientPlan& plan,
                    int64_t first, int64_t n, const float* dz, float* x, int64_t slabs, float* dkernel) {
  const int64_t k = p.kernel_size;
  const float* x_data = static_cast<const float*>(d.x) + (plan.float32 ? first * p.height * p.width * p.channels : 0);
  WgradArgs w;
  w.n = n, w.kh = w.kw = plan.patches ? 1 : k, w.pad = plan.direct_wgrad && !plan.patches ? p.pad() : 0;
  w.dz = View<const float>::Contiguous(dz, plan.grid_h, plan.grid_w, p.filters);
  w.slabs = slabs, w.slab_stride = p.kernel_elements(), w.dkernel = dkernel, w.channels = plan.grid_c;
  w.add = first > 0;
  const auto run = plan.direct_wgrad ? GetPrimitives().direct_wgrad : GetPrimitives().eigen_wgrad;
  if (plan.x_in_place) {
    w.x = View<const float>::Contiguous(x_data, p.height, p.width, p.channels);
    if (plan.transposed_wgrad) std::swap(w.x, w.dz), w.channels = p.filters;
    run(pool, w);
    if (p.skip_channels > 0) {
      const int64_t offset = first * p.skip_height * p.skip_width * p.skip_channels;
      w.x = CroppedSkip(p, static_cast<const float*>(d.skip) + offset);
      w.dkernel += p.channels * p.filters;
      run(pool, w);
    }
    return;
  }
  if (plan.patches) {
    const void* source = At(d.x, p.dtype, first * p.height * p.width * p.channels);
    GatherPatches(pool, source, p.dtype, n, p.height, p.width, p.channels, k, p.pad(), x);
    w.x = View<const float>::Contiguous(x, plan.grid_h, plan.grid_w, plan.grid_c);
  } else {
    const int64_t pad = plan.direct_wgrad ? 0 : p.pad();
    GatherInputs(pool, p, d.x, d.skip, first, n, pad, x);
    w.x = View<const float>::Contiguous(x, p.height + 2 * pad, p.width + 2 * pad, plan.grid_c);
    if (plan.direct_wgrad && p.skip_channels > 0) {  // one input after the other, as served
      w.x.c = p.channels;
      run(pool, w);
      w.x.data += p.channels, w.x.c = p.skip_channels;
      w.dkernel += p.channels * p.filters;
    }
  }
  run(pool, w);
}

}  // namespace

void Conv2DBiasRelu(ThreadPool& pool, const Conv2DProblem& p, const Conv2DForward& d) {
  const bool float32 = p.dtype == DType::kFloat32;
  const int64_t in_size = p.height * p.width * p.in_channels(), out_size = p.out_height() * p.out_width() * p.filters;
  Buffer kernel_storage, bias_storage, x_storage, y_storage;
  ConvArgs a;
  a.kernel = AsFloat(pool, d.kernel, p.dtype, p.kernel_elements(), &kernel_storage);
  a.bias = AsFloat(pool, d.bias, p.dtype, p.filters, &bias_storage);
  a.kh = a.kw = p.kernel_size, a.filters = p.filters, a.pad_top = a.pad_left = p.pad(), a.relu = p.relu;
  a.x[0] = View<const float>::Contiguous(static_cast<const float*>(d.x), p.height, p.width, p.channels);
  a.x[1] = CroppedSkip(p, static_cast<const float*>(d.skip));
  a.y = View<float>::Contiguous(static_cast<float*>(d.y), p.out_height(), p.out_width(), p.filters);
  const bool in_place = float32 && (p.skip_channels == 0 || GetPrimitives().direct_conv_serves(a));
  const int64_t chunk = in_place ? p.batch : ImagesPerChunk(p.batch, in_size + (float32 ? 0 : out_size));
  if (!in_place) {
    x_storage = Buffer(chunk * in_size);
    a.x[0] = View<const float>::Contiguous(x_storage.get(), p.height, p.width, p.in_channels());
    a.x[1] = {};
  }
  if (!float32) {
    y_storage = Buffer(chunk * out_size);
    a.y.data = y_storage.get();
  }
  for (int64_t first = 0; first < p.batch; first += chunk) {
    a.n = std::min(chunk, p.batch - first);
    if (!in_place) GatherInputs(pool, p, d.x, d.skip, first, a.n, 0, x_storage.get());
    if (float32) a.y.data = static_cast<float*>(d.y) + first * out_size;
    Conv(pool, a);
    if (!float32) ParallelFromFloat(pool, a.y.data, p.dtype, At(d.y, p.dtype, first * out_size), a.n * out_size);
  }
  if (p.pool) MaxPool2D(pool, p.dtype, p.batch, p.out_height(), p.out_width(), p.filters, d.y, d.pooled);
}

void Conv2DBiasReluGrad(ThreadPool& pool, const Conv2DProblem& p, const Conv2DGradient& d) {
  const GradientPlan plan(p, d);
  const int64_t k = p.kernel_size, ci = p.in_channels(), co = p.filters, oh = p.out_height(), ow = p.out_width();
  Buffer kernel_storage, rotated, x_storage, dinput;
  const bool copy_dinput = plan.want_dx && !plan.dx_in_place;
  const int64_t chunk =
      ImagesPerChunk(p.batch, (plan.dz_in_place ? 0 : plan.dz_size) + (plan.x_in_place ? 0 : plan.x_size) +
                                  (copy_dinput ? plan.dinput_size : 0));
  Buffer dz_storage(plan.dz_in_place ? 0 : chunk * plan.dz_size);
  if (!plan.x_in_place) x_storage = Buffer(chunk * plan.x_size);
  if (copy_dinput) dinput = Buffer(chunk * plan.dinput_size);
  if (plan.want_dx) {
    rotated = Buffer(p.kernel_elements());
    const float* kernel = AsFloat(pool, d.kernel, p.dtype, p.kernel_elements(), &kernel_storage);
    TransposeTaps(pool, kernel, k * k, ci, co, /*reverse=*/true, rotated.get());
  }
  const int64_t wgrad_k = plan.patches ? 1 : k,
                slabs = WgradSlabs(plan.direct_wgrad, wgrad_k, wgrad_k, plan.grid_c, co);
  // A single slab of float32 is the result.
  const bool dkernel_in_place = plan.float32 && slabs == 1 && !plan.transposed_wgrad && p.batch > 0;
  Buffer dkernel_storage(dkernel_in_place ? 0 : slabs * p.kernel_elements());
  float* dkernel = dkernel_in_place ? static_cast<float*>(d.dkernel) : dkernel_storage.get();
  std::vector<float> row_sums(p.batch * oh * co);

  for (int64_t first = 0; first < p.batch; first += chunk) {
    const int64_t n = std::min(chunk, p.batch - first), out_offset = first * oh * ow * co;
    MaskedGradient m;
    m.dy = At(d.dy, p.dtype, first * p.dy_height * p.dy_width * co), m.y = At(d.y, p.dtype, out_offset);
    m.dy_h = p.dy_height, m.dy_w = p.dy_width, m.dy_top = p.dy_top(), m.dy_left = p.dy_left();
    m.dpooled = p.pool ? At(d.dpooled, p.dtype, first * (oh / 2) * (ow / 2) * co) : nullptr;
    m.type = p.dtype, m.n = n, m.h = oh, m.w = ow, m.c = co, m.relu = p.relu && (p.pool || !p.dy_is_masked);
    m.dz = plan.dz_in_place ? nullptr : dz_storage.get(), m.grid_h = plan.grid_h, m.grid_w = plan.grid_w,
    m.row_sums = row_sums.data() + first * oh * co;
    MaskGradient(pool, m);
    const float* dz = plan.dz_in_place ? static_cast<const float*>(m.dy) : dz_storage.get();
    if (plan.want_dx) InputGradient(pool, p, d, plan, first, n, dz, rotated.get(), dinput.get());
    WeightGradient(pool, p, d, plan, first, n, dz, x_storage.get(), slabs, dkernel);
  }
  const int64_t summed = p.batch > 0 ? slabs : 0;
  if (plan.transposed_wgrad) {
    Buffer sum(p.kernel_elements());
    SumSlabs(pool, dkernel, summed, p.kernel_elements(), DType::kFloat32, sum.get());
    TransposeTaps(pool, sum.get(), 1, co, ci, /*reverse=*/false, static_cast<float*>(d.dkernel));
  } else if (!dkernel_in_place) {
    SumSlabs(pool, dkernel, summed, p.kernel_elements(), p.dtype, d.dkernel);
  }
  SumRows(row_sums, co, p.dtype, d.dbias);
}

}  // namespace unet_fast::cpu
