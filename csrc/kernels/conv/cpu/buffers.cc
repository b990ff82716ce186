#include "conv/cpu/buffers.h"

#include <algorithm>
#include <cstring>

#include "conv/cpu/primitives.h"

namespace unet_fast::cpu {
namespace {

constexpr int64_t kChunkFloats = 1 << 20;  // 4 MiB of temporaries: from pass to pass they stay in cache
constexpr int64_t kBlock = 1 << 15;        // elements a task of an element-wise pass

// A row of `type` as float32: in place, or converted into `storage`.
const float* Row(const void* data, DType type, int64_t offset, int64_t count, std::vector<float>* storage) {
  if (type == DType::kFloat32) return static_cast<const float*>(data) + offset;
  storage->resize(count);
  GetPrimitives().to_float(At(data, type, offset), type, storage->data(), count);
  return storage->data();
}

}  // namespace

int64_t ImagesPerChunk(int64_t batch, int64_t floats_per_image) {
  return std::min(batch, std::max<int64_t>(1, kChunkFloats / std::max<int64_t>(1, floats_per_image)));
}

void ParallelToFloat(ThreadPool& pool, const void* source, DType type, float* target, int64_t count) {
  ParallelFor(pool, (count + kBlock - 1) / kBlock, [&](int64_t i) {
    const int64_t begin = i * kBlock;
    GetPrimitives().to_float(At(source, type, begin), type, target + begin, std::min(kBlock, count - begin));
  });
}

void ParallelFromFloat(ThreadPool& pool, const float* source, DType type, void* target, int64_t count) {
  ParallelFor(pool, (count + kBlock - 1) / kBlock, [&](int64_t i) {
    const int64_t begin = i * kBlock;
    GetPrimitives().from_float(source + begin, type, At(target, type, begin), std::min(kBlock, count - begin));
  });
}

const float* AsFloat(ThreadPool& pool, const void* source, DType type, int64_t count, Buffer* storage) {
  if (type == DType::kFloat32) return static_cast<const float*>(source);
  *storage = Buffer(count);
  ParallelToFloat(pool, source, type, storage->get(), count);
  return storage->get();
}

void GatherToGrid(ThreadPool& pool, const Gather& g) {
  if (g.c == 0) return;  // x may have no channels where skip has some
  ParallelFor(pool, g.n * g.grid_h, [&](int64_t row) {
    const int64_t n = row / g.grid_h, i = row % g.grid_h - g.pad;
    float* target = g.target + row * g.grid_w * g.grid_c + g.channel;
    const auto zero = [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) std::fill_n(target + j * g.grid_c, g.c, 0.0f);
    };
    if (i < 0 || i >= g.rows) return zero(0, g.grid_w);
    zero(0, g.pad);
    zero(g.pad + g.cols, g.grid_w);
    const int64_t offset = ((n * g.h + i + g.top) * g.w + g.left) * g.c;
    if (g.grid_c == g.c) {
      GetPrimitives().to_float(At(g.source, g.type, offset), g.type, target + g.pad * g.c, g.cols * g.c);
      return;
    }
    std::vector<float> storage;
    const float* source = Row(g.source, g.type, offset, g.cols * g.c, &storage);
    for (int64_t j = 0; j < g.cols; ++j) {
      std::memcpy(target + (g.pad + j) * g.grid_c, source + j * g.c, g.c * sizeof(float));
    }
  });
}

void GatherPatches(ThreadPool& pool, const void* source, DType type, int64_t n, int64_t h, int64_t w, int64_t c,
                   int64_t k, int64_t pad, float* target) {
  const int64_t rows = h + 2 * pad - k + 1, cols = w + 2 * pad - k + 1;
  ParallelFor(pool, n * rows, [&](int64_t row) {
    std::vector<float> storage;
    const int64_t image = row / rows, i = row % rows;
    for (int64_t r = 0; r < k; ++r) {
      const int64_t source_row = i + r - pad;
      const bool inside = source_row >= 0 && source_row < h;
      const float* x = inside ? Row(source, type, (image * h + source_row) * w * c, w * c, &storage) : nullptr;
      for (int64_t t = 0; t < k * c; ++t) {  // one element of every patch: a loop without a branch
        const int64_t s = t / c, begin = std::clamp<int64_t>(pad - s, 0, cols);
        const int64_t end = inside ? std::clamp(w + pad - s, begin, cols) : begin;
        float* patch = target + (row * cols * k + r) * k * c + t;
        const int64_t stride = k * k * c;
        for (int64_t j = 0; j < begin; ++j) patch[j * stride] = 0.0f;
        for (int64_t j = begin; j < end; ++j) patch[j * stride] = x[(j + s - pad) * c + t % c];
        for (int64_t j = end; j < cols; ++j) patch[j * stride] = 0.0f;
      }
    }
  });
}

// Row i of dy in y's width, zeros outside of its window: in place, or in `storage`.
static const float* DyRow(const MaskedGradient& g, int64_t n, int64_t i, std::vector<float>* storage) {
  const int64_t count = g.dy_w * g.c, row = i - g.dy_top, offset = (n * g.dy_h + row) * count;
  const bool covered = row >= 0 && row < g.dy_h;
  if (covered && g.dy_w == g.w) return Row(g.dy, g.type, offset, count, storage);
  storage->assign(g.w * g.c, 0.0f);
  if (covered) {
    GetPrimitives().to_float(At(g.dy, g.type, offset), g.type, storage->data() + g.dy_left * g.c, count);
  }
  return storage->data();
}

void MaskGradient(ThreadPool& pool, const MaskedGradient& g) {
  // A task is a pair of rows, which pooling reads together; the grid's rows beyond the image are tasks of their own.
  const int64_t pairs = (g.grid_h + 1) / 2, row_floats = g.w * g.c;
  ParallelFor(pool, g.n * pairs, [&](int64_t task) {
    const int64_t n = task / pairs, first = task % pairs * 2, rows = std::min<int64_t>(2, g.h - first);
    std::vector<float> dy_storage[2], y_storage[2], pooled_storage;
    UnpooledRows r{};
    for (int64_t q = 0; q < 2 && first + q < g.grid_h && g.dz != nullptr; ++q) {
      r.dz[q] = g.dz + (n * g.grid_h + first + q) * g.grid_w * g.c;
      std::fill(r.dz[q] + (q < rows ? row_floats : 0), r.dz[q] + g.grid_w * g.c, 0.0f);
    }
    for (int64_t q = 0; q < rows; ++q) {
      const int64_t offset = (n * g.h + first + q) * row_floats;
      r.dy[q] = DyRow(g, n, first + q, &dy_storage[q]);
      if (g.relu || g.dpooled != nullptr) r.y[q] = Row(g.y, g.type, offset, row_floats, &y_storage[q]);
      r.sums[q] = g.row_sums + (n * g.h + first + q) * g.c;
      std::fill_n(r.sums[q], g.c, 0.0f);
    }
    int64_t done = 0;  // pixels of each row
    if (g.dpooled != nullptr && rows == 2) {
      r.cols = g.w / 2, r.c = g.c, r.relu = g.relu;
      r.dpooled = Row(g.dpooled, g.type, (n * (g.h / 2) + first / 2) * r.cols * g.c, r.cols * g.c, &pooled_storage);
      GetPrimitives().unpool_gradient_rows(r);
      done = 2 * r.cols;
    }
    for (int64_t q = 0; q < rows && done < g.w; ++q) {
      const int64_t at = done * g.c;
      GetPrimitives().mask_gradient_row(r.dy[q] + at, g.relu ? r.y[q] + at : nullptr, g.w - done, g.c,
                                        r.dz[q] != nullptr ? r.dz[q] + at : nullptr, r.sums[q]);
    }
  });
}

void SumRows(const std::vector<float>& rows, int64_t channels, DType type, void* target) {
  std::vector<double> sum(channels, 0.0);
  for (size_t row = 0; row < rows.size(); row += channels) {
    for (int64_t c = 0; c < channels; ++c) sum[c] += rows[row + c];
  }
  const std::vector<float> rounded(sum.begin(), sum.end());
  GetPrimitives().from_float(rounded.data(), type, target, channels);
}

void SumSlabs(ThreadPool& pool, const float* slabs, int64_t count, int64_t size, DType type, void* target) {
  ParallelFor(pool, (size + kBlock - 1) / kBlock, [&](int64_t task) {
    const int64_t begin = task * kBlock, length = std::min(kBlock, size - begin);
    if (count == 1) return GetPrimitives().from_float(slabs + begin, type, At(target, type, begin), length);
    std::vector<float> sum(length, 0.0f);
    for (int64_t q = 0; q < count; ++q) {
      const float* slab = slabs + q * size + begin;
      for (int64_t i = 0; i < length; ++i) sum[i] += slab[i];
    }
    GetPrimitives().from_float(sum.data(), type, At(target, type, begin), length);
  });
}

void TransposeTaps(ThreadPool& pool, const float* source, int64_t taps, int64_t a, int64_t b, bool reverse,
                   float* target) {
  constexpr int64_t kTile = 32;  // 4 KiB of each side, so that both stay in the first-level cache
  const int64_t strips = (a + kTile - 1) / kTile;
  ParallelFor(pool, taps * strips, [&](int64_t task) {
    const int64_t t = task / strips, i0 = task % strips * kTile, i1 = std::min(i0 + kTile, a);
    const float* s = source + (reverse ? taps - 1 - t : t) * a * b;
    float* d = target + t * a * b;
    for (int64_t j0 = 0; j0 < b; j0 += kTile) {
      for (int64_t j = j0; j < std::min(j0 + kTile, b); ++j) {
        for (int64_t i = i0; i < i1; ++i) d[j * a + i] = s[i * b + j];
      }
    }
  });
}

}  // namespace unet_fast::cpu
