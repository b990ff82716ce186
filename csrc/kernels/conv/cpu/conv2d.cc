// conv2d_bias_relu on the CPU. float32 runs on the caller's arrays; where a type, a skip input or a padding calls for
// a copy it is made for a few images at a time, so that temporaries do not grow with the batch.
#include "conv/cpu/conv2d.h"

#include <algorithm>
#include <vector>

#include "conv/cpu/buffers.h"
#include "conv/cpu/primitives.h"
#include "pool/max_pool2d.h"

namespace unet_fast::cpu {
namespace {

// Below this many input channels the weight gradient is faster as a matrix product over explicit patches.
constexpr int64_t kPatchesBelow = 8;

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

// Splits dinput [n, height, width, in_channels] into dx and dskip (zero outside the crop), masked where asked for.
void ScatterInputGradient(ThreadPool& pool, const Conv2DProblem& p, const Conv2DGradient& d, int64_t first, int64_t n,
                          const float* dinput) {
  const auto scatter = [&](const void* input, void* target, int64_t h, int64_t w, int64_t c, int64_t top, int64_t left,
                           int64_t channel) {
    if (target == nullptr || c == 0) return;
    ParallelFor(pool, n * h, [&](int64_t row) {
      const int64_t offset = (first * h + row) * w * c, i = row % h - top;
      std::vector<float> out(w * c, 0.0f), mask;
      if (i >= 0 && i < p.height) {
        const float* source = dinput + (row / h * p.height + i) * p.width * p.in_channels() + channel;
        for (int64_t j = 0; j < p.width; ++j) {
          std::copy_n(source + j * p.in_channels(), c, out.data() + (left + j) * c);
        }
        if (p.input_is_relu) {
          mask.resize(w * c);
          GetPrimitives().to_float(At(input, p.dtype, offset), p.dtype, mask.data(), w * c);
          for (int64_t k = 0; k < w * c; ++k) out[k] = mask[k] > 0.0f ? out[k] : 0.0f;
        }
      }
      GetPrimitives().from_float(out.data(), p.dtype, At(target, p.dtype, offset), w * c);
    });
  };
  scatter(d.x, d.dx, p.height, p.width, p.channels, 0, 0, 0);
  scatter(d.skip, d.dskip, p.skip_height, p.skip_width, p.skip_channels, p.crop_top(), p.crop_left(), p.channels);
}

}  // namespace

void Conv2DBiasRelu(ThreadPool& pool, const Conv2DProblem& p, const Conv2DForward& d) {
  const bool in_place = p.dtype == DType::kFloat32 && p.skip_channels == 0;
  const bool out_in_place = p.dtype == DType::kFloat32;
  const int64_t in_size = p.height * p.width * p.in_channels(), out_size = p.out_height() * p.out_width() * p.filters;
  Buffer kernel_storage, bias_storage, x_storage, y_storage;
  const float* kernel = AsFloat(pool, d.kernel, p.dtype, p.kernel_elements(), &kernel_storage);
  const float* bias = AsFloat(pool, d.bias, p.dtype, p.filters, &bias_storage);
  const int64_t chunk = in_place ? p.batch : ImagesPerChunk(p.batch, in_size + (out_in_place ? 0 : out_size));
  if (!in_place) x_storage = Buffer(chunk * in_size);
  if (!out_in_place) y_storage = Buffer(chunk * out_size);
  for (int64_t first = 0; first < p.batch; first += chunk) {
    const int64_t n = std::min(chunk, p.batch - first);
    if (!in_place) GatherInputs(pool, p, d.x, d.skip, first, n, 0, x_storage.get());
    ConvArgs a;
    a.x = in_place ? static_cast<const float*>(d.x) : x_storage.get();
    a.n = n, a.h = p.height, a.w = p.width, a.ci = p.in_channels();
    a.kernel = kernel, a.kh = a.kw = p.kernel_size, a.co = p.filters, a.stride = 1;
    a.pad_top = a.pad_bottom = a.pad_left = a.pad_right = p.pad();
    a.y = out_in_place ? static_cast<float*>(d.y) + first * out_size : y_storage.get();
    a.bias = bias, a.relu = p.relu;
    GetPrimitives().conv(pool, a);
    if (!out_in_place) ParallelFromFloat(pool, a.y, p.dtype, At(d.y, p.dtype, first * out_size), n * out_size);
  }
  if (p.pool) MaxPool2D(pool, p.dtype, p.batch, p.out_height(), p.out_width(), p.filters, d.y, d.pooled);
}

void Conv2DBiasReluGrad(ThreadPool& pool, const Conv2DProblem& p, const Conv2DGradient& d) {
  const int64_t k = p.kernel_size, ci = p.in_channels(), co = p.filters, oh = p.out_height(), ow = p.out_width();
  const bool patches = k > 1 && ci < kPatchesBelow && p.skip_channels == 0;
  const bool want_dx = d.dx != nullptr || d.dskip != nullptr;
  const bool dx_in_place = p.dtype == DType::kFloat32 && p.skip_channels == 0;
  const bool x_in_place = dx_in_place && p.pad() == 0 && !patches;
  // dz lies in the grid that the weight gradient walks: that of the padded input, or of the patches.
  const int64_t grid_h = patches ? oh : p.height + 2 * p.pad(), grid_w = patches ? ow : p.width + 2 * p.pad();
  const int64_t grid_c = patches ? k * k * ci : ci;
  const int64_t wgrad_k = patches ? 1 : k;
  const int64_t dz_size = grid_h * grid_w * co, x_size = grid_h * grid_w * grid_c;
  const int64_t dinput_size = p.height * p.width * ci;

  Buffer kernel_storage, rotated, x_storage, dinput;
  const int64_t chunk =
      ImagesPerChunk(p.batch, dz_size + (x_in_place ? 0 : x_size) + (want_dx && !dx_in_place ? dinput_size : 0));
  Buffer dz(chunk * dz_size);
  if (!x_in_place) x_storage = Buffer(chunk * x_size);
  if (want_dx) {
    rotated = Buffer(p.kernel_elements());
    const float* kernel = AsFloat(pool, d.kernel, p.dtype, p.kernel_elements(), &kernel_storage);
    TransposeTaps(pool, kernel, k * k, ci, co, /*reverse=*/true, rotated.get());
    if (!dx_in_place) dinput = Buffer(chunk * dinput_size);
  }
  const int64_t slabs = WgradSlabs(wgrad_k, wgrad_k, grid_c, co);
  std::vector<float> dkernel(slabs * p.kernel_elements(), 0.0f);
  std::vector<float> row_sums(p.batch * oh * co);

  for (int64_t first = 0; first < p.batch; first += chunk) {
    const int64_t n = std::min(chunk, p.batch - first), out_offset = first * oh * ow * co;
    MaskedGradient m;
    m.dy = At(d.dy, p.dtype, out_offset), m.y = At(d.y, p.dtype, out_offset);
    m.dpooled = p.pool ? At(d.dpooled, p.dtype, first * (oh / 2) * (ow / 2) * co) : nullptr;
    m.type = p.dtype, m.n = n, m.h = oh, m.w = ow, m.c = co, m.relu = p.relu;
    m.dz = dz.get(), m.grid_h = grid_h, m.grid_w = grid_w, m.row_sums = row_sums.data() + first * oh * co;
    MaskGradient(pool, m);

    if (want_dx) {
      const int64_t before = k - 1 - p.pad();  // full correlation with the rotated kernel
      ConvArgs a;
      a.x = dz.get(), a.n = n, a.h = grid_h, a.w = grid_w, a.ci = co;
      a.kernel = rotated.get(), a.kh = a.kw = k, a.co = ci, a.stride = 1;
      a.pad_top = a.pad_left = before;
      a.pad_bottom = p.height - (grid_h + before - k + 1), a.pad_right = p.width - (grid_w + before - k + 1);
      a.y = dx_in_place ? static_cast<float*>(d.dx) + first * dinput_size : dinput.get();
      if (dx_in_place && p.input_is_relu) a.mask = static_cast<const float*>(d.x) + first * dinput_size;
      GetPrimitives().conv(pool, a);
      if (!dx_in_place) ScatterInputGradient(pool, p, d, first, n, dinput.get());
    }

    if (patches) {
      GatherPatches(pool, At(d.x, p.dtype, first * p.height * p.width * ci), p.dtype, n, p.height, p.width, ci, k,
                    p.pad(), x_storage.get());
    } else if (!x_in_place) {
      GatherInputs(pool, p, d.x, d.skip, first, n, p.pad(), x_storage.get());
    }
    WgradArgs w;
    w.x = x_in_place ? static_cast<const float*>(d.x) + first * dinput_size : x_storage.get();
    w.dz = dz.get(), w.n = n, w.h = grid_h, w.w = grid_w, w.ci = grid_c, w.co = co, w.rows = oh, w.cols = ow;
    w.kh = w.kw = wgrad_k, w.slabs = slabs, w.dkernel = dkernel.data();
    GetPrimitives().wgrad(pool, w);
  }
  SumSlabs(pool, dkernel.data(), slabs, p.kernel_elements(), p.dtype, d.dkernel);
  SumRows(row_sums, co, p.dtype, d.dbias);
}

}  // namespace unet_fast::cpu
