// conv2d_transpose_bias_relu on the CPU, stride 2. Output rows of one parity see only some kernel rows - even ones
// r = 0 of input row i and, in a 3x3 kernel, r = 2 of row i - 1; odd ones r = 1 of row i - and columns likewise. So
// each of the four parities is an ordinary small convolution of x: nine products a pixel of x, none with a zero.
#include <algorithm>
#include <vector>

#include "conv/cpu/buffers.h"
#include "conv/cpu/conv2d.h"
#include "conv/cpu/primitives.h"

namespace unet_fast::cpu {
namespace {

// Kernel rows (or columns) that output rows of `parity` see: r = parity + 2 q for q = 0 .. Taps - 1.
int64_t Taps(int64_t kernel_size, int64_t parity) { return kernel_size == 3 && parity == 0 ? 2 : 1; }

}  // namespace

void Conv2DTransposeBiasRelu(ThreadPool& pool, const Conv2DTransposeProblem& p, const Conv2DTransposeForward& d) {
  const int64_t k = p.kernel_size, ci = p.channels, co = p.filters, h = p.height, w = p.width;
  const bool in_place = p.dtype == DType::kFloat32;
  Buffer kernel_storage, bias_storage, x_storage;
  const float* kernel = AsFloat(pool, d.kernel, p.dtype, p.kernel_elements(), &kernel_storage);
  const float* bias = AsFloat(pool, d.bias, p.dtype, co, &bias_storage);
  Buffer transposed(p.kernel_elements());  // [k, k, ci, co]
  TransposeTaps(pool, kernel, k * k, co, ci, /*reverse=*/false, transposed.get());
  ConvArgs c;
  c.x[0] = View<const float>::Contiguous(static_cast<const float*>(d.x), h, w, ci);
  c.kh = c.kw = 2, c.filters = co, c.bias = bias, c.relu = p.relu;
  c.y = View<float>::Contiguous(static_cast<float*>(d.y), h, w, co);
  // Writes every second pixel of y itself; else a plane of one parity is made first and then dealt out.
  const bool strided = in_place && GetPrimitives().direct_conv_serves(c);
  const int64_t chunk = strided ? p.batch : ImagesPerChunk(p.batch, h * w * (co + (in_place ? 0 : ci)));
  Buffer plane(strided ? 0 : chunk * h * w * co), taps(4 * ci * co);
  if (!in_place) x_storage = Buffer(chunk * h * w * ci);
  for (int64_t first = 0; first < p.batch; first += chunk) {
    const int64_t n = std::min(chunk, p.batch - first);
    const void* x = At(d.x, p.dtype, first * h * w * ci);
    if (!in_place) ParallelToFloat(pool, x, p.dtype, x_storage.get(), n * h * w * ci);
    c.n = n, c.x[0].data = in_place ? static_cast<const float*>(x) : x_storage.get();
    for (int64_t parity = 0; parity < 4; ++parity) {
      const int64_t a = parity / 2, b = parity % 2;
      c.kh = Taps(k, a), c.kw = Taps(k, b);
      // The convolution reads x[i - 1], x[i] in this order; their kernel rows are 2 and 0.
      for (int64_t r = 0; r < c.kh; ++r) {
        for (int64_t s = 0; s < c.kw; ++s) {
          const int64_t tap = (a + 2 * (c.kh - 1 - r)) * k + b + 2 * (c.kw - 1 - s);
          std::copy_n(transposed.get() + tap * ci * co, ci * co, taps.get() + (r * c.kw + s) * ci * co);
        }
      }
      c.kernel = taps.get(), c.pad_top = c.kh - 1, c.pad_left = c.kw - 1;
      if (strided) {
        c.y =
            View<float>{static_cast<float*>(d.y) + (a * 2 * w + b) * co, h, w, co, 2 * co, 4 * w * co, 4 * h * w * co};
        GetPrimitives().direct_conv(pool, c);
        continue;
      }
      c.y.data = plane.get();
      Conv(pool, c);
      ParallelFor(pool, n * h, [&](int64_t row) {
        const float* source = plane.get() + row * w * co;
        const int64_t target = ((first * h + row) * 2 + a) * 2 * w + b;
        for (int64_t j = 0; j < w; ++j) {
          GetPrimitives().from_float(source + j * co, p.dtype, At(d.y, p.dtype, (target + 2 * j) * co), co);
        }
      });
    }
  }
}

void Conv2DTransposeBiasReluGrad(ThreadPool& pool, const Conv2DTransposeProblem& p, const Conv2DTransposeGradient& d) {
  const int64_t k = p.kernel_size, ci = p.channels, co = p.filters, h = p.height, w = p.width;
  const bool in_place = p.dtype == DType::kFloat32;
  const int64_t out_size = 4 * h * w * co, in_size = h * w * ci;
  // One row and column more than x: a tap of 3x3 kernels reads the next pixel of the same parity.
  const int64_t grid_h = h + 1, grid_w = w + 1;
  Buffer kernel_storage, dx_storage;
  WgradArgs served;
  served.x.c = co, served.dz.c = ci;
  const bool direct = in_place && GetPrimitives().direct_wgrad_serves(served);     // reads x and dz where they are
  const bool masks = p.relu && !p.dy_is_masked, dz_in_place = in_place && !masks;  // dy is dz already
  const int64_t chunk = ImagesPerChunk(
      p.batch, (dz_in_place ? 0 : out_size) + (direct ? 0 : grid_h * grid_w * (ci + co)) + (in_place ? 0 : in_size));
  Buffer dz_storage(dz_in_place ? 0 : chunk * out_size), plane, x_grid;
  if (!direct) plane = Buffer(chunk * grid_h * grid_w * co), x_grid = Buffer(chunk * grid_h * grid_w * ci);
  const float* kernel = nullptr;
  if (d.dx != nullptr) {
    kernel = AsFloat(pool, d.kernel, p.dtype, p.kernel_elements(), &kernel_storage);
    if (!in_place) dx_storage = Buffer(chunk * in_size);
  }
  Buffer dkernel[4];
  std::vector<float> row_sums(p.batch * 2 * h * co);
  int64_t slabs[4];
  for (int64_t parity = 0; parity < 4; ++parity) {
    const int64_t kh = Taps(k, parity / 2), kw = Taps(k, parity % 2);
    slabs[parity] = WgradSlabs(direct, kh, kw, co, ci);
    dkernel[parity] = Buffer(slabs[parity] * kh * kw * co * ci);
  }

  for (int64_t first = 0; first < p.batch; first += chunk) {
    const int64_t n = std::min(chunk, p.batch - first);
    MaskedGradient m;
    m.dy = At(d.dy, p.dtype, first * out_size), m.y = At(d.y, p.dtype, first * out_size), m.dpooled = nullptr;
    m.type = p.dtype, m.n = n, m.h = 2 * h, m.w = 2 * w, m.c = co, m.relu = masks;
    m.dy_h = m.h, m.dy_w = m.w, m.dy_top = m.dy_left = 0;
    m.dz = dz_in_place ? nullptr : dz_storage.get(), m.grid_h = 2 * h, m.grid_w = 2 * w,
    m.row_sums = row_sums.data() + first * 2 * h * co;
    MaskGradient(pool, m);
    const float* dz = dz_in_place ? static_cast<const float*>(m.dy) : dz_storage.get();

    if (d.dx != nullptr) {  // dx[i] = sum over r of dz[2 i + r] kernel[r]
      ConvArgs a;
      a.n = n, a.x[0] = View<const float>::Contiguous(dz, 2 * h, 2 * w, co);
      a.kernel = kernel, a.kh = a.kw = k, a.filters = ci, a.stride = 2;
      a.y =
          View<float>::Contiguous(in_place ? static_cast<float*>(d.dx) + first * in_size : dx_storage.get(), h, w, ci);
      if (p.input_is_relu && in_place) {
        a.mask = View<const float>::Contiguous(static_cast<const float*>(d.x) + first * in_size, h, w, ci);
      }
      Conv(pool, a);
      if (p.input_is_relu && !in_place) {
        ParallelFor(pool, n * h, [&](int64_t row) {
          std::vector<float> mask(w * ci);
          GetPrimitives().to_float(At(d.x, p.dtype, first * in_size + row * w * ci), p.dtype, mask.data(), w * ci);
          float* dx = a.y.data + row * w * ci;
          for (int64_t i = 0; i < w * ci; ++i) dx[i] = mask[i] > 0.0f ? dx[i] : 0.0f;
        });
      }
      if (!in_place) ParallelFromFloat(pool, a.y.data, p.dtype, At(d.dx, p.dtype, first * in_size), n * in_size);
    }

    if (!direct) {
      Gather g;
      g.source = At(d.x, p.dtype, first * in_size), g.type = p.dtype, g.n = n, g.h = h, g.w = w, g.c = ci;
      g.top = g.left = 0, g.rows = h, g.cols = w, g.target = x_grid.get();
      g.grid_h = grid_h, g.grid_w = grid_w, g.grid_c = ci, g.channel = g.pad = 0;
      GatherToGrid(pool, g);
    }
    for (int64_t parity = 0; parity < 4; ++parity) {
      const int64_t a = parity / 2, b = parity % 2;
      WgradArgs args;  // dz takes the part of the input, x that of the output gradient
      args.n = n, args.kh = Taps(k, a), args.kw = Taps(k, b), args.channels = co;
      args.slabs = slabs[parity], args.slab_stride = args.kh * args.kw * co * ci, args.dkernel = dkernel[parity].get();
      args.add = first > 0;
      if (direct) {
        args.x = View<const float>{dz + (a * 2 * w + b) * co, h, w, co, 2 * co, 4 * w * co, out_size};
        args.dz = View<const float>::Contiguous(static_cast<const float*>(d.x) + first * in_size, h, w, ci);
        GetPrimitives().direct_wgrad(pool, args);
        continue;
      }
      ParallelFor(pool, n * grid_h, [&](int64_t row) {
        const int64_t image = row / grid_h, i = row % grid_h;
        float* target = plane.get() + row * grid_w * co;
        std::fill_n(target, grid_w * co, 0.0f);
        if (i == h) return;
        const float* source = dz + (((image * h + i) * 2 + a) * 2 * w + b) * co;
        for (int64_t j = 0; j < w; ++j) std::copy_n(source + 2 * j * co, co, target + j * co);
      });
      args.x = View<const float>::Contiguous(plane.get(), grid_h, grid_w, co);
      args.dz = View<const float>::Contiguous(x_grid.get(), grid_h, grid_w, ci);
      GetPrimitives().eigen_wgrad(pool, args);
    }
  }

  for (int64_t parity = 0; parity < 4; ++parity) {
    const int64_t a = parity / 2, b = parity % 2, kh = Taps(k, a), kw = Taps(k, b), size = kh * kw * co * ci;
    Buffer sum(size);
    SumSlabs(pool, dkernel[parity].get(), p.batch > 0 ? slabs[parity] : 0, size, DType::kFloat32, sum.get());
    for (int64_t r = 0; r < kh; ++r) {
      for (int64_t s = 0; s < kw; ++s) {
        const int64_t tap = (a + 2 * r) * k + b + 2 * s;
        ParallelFromFloat(pool, sum.get() + (r * kw + s) * co * ci, p.dtype, At(d.dkernel, p.dtype, tap * co * ci),
                          co * ci);
      }
    }
  }
  SumRows(row_sums, co, p.dtype, d.dbias);
}

}  // namespace unet_fast::cpu
