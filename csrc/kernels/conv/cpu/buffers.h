// Temporary float32 arrays of the CPU drivers and the element-wise passes that fill and empty them.
#pragma once

#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "common/dtype.h"
#include "common/thread_pool.h"

namespace unet_fast::cpu {

// Uninitialised floats, aligned for every instruction set.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size) : data_(static_cast<float*>(::operator new(size * sizeof(float), kAlign))) {}
  float* get() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kAlign{64};
  struct Free {
    void operator()(float* p) const { ::operator delete(p, kAlign); }
  };
  std::unique_ptr<float, Free> data_;
};

// Images at a time, so that temporaries of `floats_per_image` stay within a fixed budget (or are one image's);
// none of an empty batch, whose images may be of any size.
int64_t ImagesPerChunk(int64_t batch, int64_t floats_per_image);

void ParallelToFloat(ThreadPool& pool, const void* source, DType type, float* target, int64_t count);
void ParallelFromFloat(ThreadPool& pool, const float* source, DType type, void* target, int64_t count);

// Weights of any type as float32: the data itself where it already is, else a copy held by `storage`.
const float* AsFloat(ThreadPool& pool, const void* source, DType type, int64_t count, Buffer* storage);

// target[n, i, j, :] = source[n, i + top, j + left, :] for i < rows, j < cols; written into channels
// [channel, channel + c) of a grid [n, grid_h, grid_w, grid_c] at row and column `pad`, zeros around it.
struct Gather {
  const void* source;  // [n, h, w, c]
  DType type;
  int64_t n, h, w, c;
  int64_t top, left, rows, cols;
  float* target;
  int64_t grid_h, grid_w, grid_c, channel, pad;
};
void GatherToGrid(ThreadPool& pool, const Gather& g);

// target[n, i, j, (r * k + s) * c + :] = source[n, i + r - pad, j + s - pad, :], zero outside: the patches of a k x k
// convolution, for inputs of so few channels that a matrix product over k * k * c is the faster way.
void GatherPatches(ThreadPool& pool, const void* source, DType type, int64_t n, int64_t h, int64_t w, int64_t c,
                   int64_t k, int64_t pad, float* target);

// The gradient of what lies under the activation:
//   dz = (dy + unpool(dpooled)) * (y > 0), written into a grid [n, grid_h, grid_w, c], zeros beyond h x w, unless null;
//   row_sums[n * h, c] gets its sum over each row.
struct MaskedGradient {
  const void* dy;           // [n, dy_h, dy_w, c], a window of y at (dy_top, dy_left); zero outside of it
  const void *dpooled, *y;  // [n, h / 2, w / 2, c] or null, [n, h, w, c]
  DType type;
  int64_t n, h, w, c;
  int64_t dy_h, dy_w, dy_top, dy_left;
  bool relu;  // else no mask
  float* dz;
  int64_t grid_h, grid_w;
  float* row_sums;
};
void MaskGradient(ThreadPool& pool, const MaskedGradient& g);

// target[c] = sum over rows, in a fixed order.
void SumRows(const std::vector<float>& rows, int64_t channels, DType type, void* target);

// target[...] = sum of the slabs, in a fixed order; zero if there are none.
void SumSlabs(ThreadPool& pool, const float* slabs, int64_t count, int64_t size, DType type, void* target);

// target[t, b, a] = source[order(t), a, b], with order(t) = taps - 1 - t where `reverse`, else t.
void TransposeTaps(ThreadPool& pool, const float* source, int64_t taps, int64_t a, int64_t b, bool reverse,
                   float* target);

}  // namespace unet_fast::cpu
