#include "pool/max_pool2d.h"

#include <algorithm>
#include <vector>

#include "conv/cpu/primitives.h"

namespace unet_fast::cpu {
namespace {

// NaN where either is, as on the GPU; std::max would depend on the order.
float Max(float a, float b) { return a > b || a != a ? a : b; }

}  // namespace

void MaxPool2D(ThreadPool& pool, DType type, int64_t n, int64_t h, int64_t w, int64_t c, const void* x, void* y) {
  const int64_t oh = h / 2, ow = w / 2;
  ParallelFor(pool, n * oh, [&](int64_t row) {
    std::vector<float> storage(2 * w * c), out(ow * c);
    GetPrimitives().to_float(At(x, type, (row / oh * h + row % oh * 2) * w * c), type, storage.data(), 2 * w * c);
    const float *top = storage.data(), *bottom = top + w * c;
    for (int64_t j = 0; j < ow; ++j) {
      for (int64_t k = 0; k < c; ++k) {
        const int64_t left = 2 * j * c + k, right = left + c;
        out[j * c + k] = Max(Max(top[left], top[right]), Max(bottom[left], bottom[right]));
      }
    }
    GetPrimitives().from_float(out.data(), type, At(y, type, row * ow * c), ow * c);
  });
}

void MaxPool2DGrad(ThreadPool& pool, DType type, int64_t n, int64_t h, int64_t w, int64_t c, const void* x,
                   const void* dy, void* dx) {
  const int64_t oh = h / 2, ow = w / 2, pairs = (h + 1) / 2;
  ParallelFor(pool, n * pairs, [&](int64_t task) {
    const int64_t image = task / pairs, i = task % pairs, rows = std::min<int64_t>(2, h - 2 * i);
    const int64_t offset = (image * h + 2 * i) * w * c;
    std::vector<float> gradient(rows * w * c, 0.0f);
    if (i < oh) {
      std::vector<float> storage(2 * w * c), dpooled(ow * c);
      GetPrimitives().to_float(At(x, type, offset), type, storage.data(), 2 * w * c);
      GetPrimitives().to_float(At(dy, type, (image * oh + i) * ow * c), type, dpooled.data(), ow * c);
      const float *top = storage.data(), *bottom = top + w * c;
      for (int64_t j = 0; j < ow; ++j) {
        for (int64_t k = 0; k < c; ++k) {
          const int64_t left = 2 * j * c + k, right = left + c;
          int64_t at = left;
          float best = top[left];
          if (top[right] > best) best = top[right], at = right;
          if (bottom[left] > best) best = bottom[left], at = w * c + left;
          if (bottom[right] > best) at = w * c + right;
          gradient[at] = dpooled[j * c + k];
        }
      }
    }
    GetPrimitives().from_float(gradient.data(), type, At(dx, type, offset), rows * w * c);
  });
}

}  // namespace unet_fast::cpu
