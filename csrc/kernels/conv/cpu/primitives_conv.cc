// Forward and input-gradient convolutions: Eigen's spatial convolution (the one in TensorFlow's wheel) with an
// epilogue.
//
// Built once an instruction set. UNET_FAST_ISA names it, and Eigen's namespace is renamed after it: two builds of one
// inline function under one name would be merged by the linker, and the wrong one could win.
#define EIGEN_USE_THREADS
#include "conv/cpu/rename_eigen.h"
// Eigen's own AVX-512 GEMM kernels pack the right-hand side by a specialisation that clashes with that of the spatial
// convolution; without them the generic kernels run, on the same 16-float packets.
#define EIGEN_USE_AVX512_GEMM_KERNELS 0
#include "unsupported/Eigen/CXX11/Tensor"
#include "xla/tsl/framework/convolution/eigen_spatial_convolutions.h"

#include <memory>
#include <utility>

#include "conv/cpu/primitives.h"

namespace unet_fast::cpu::UNET_FAST_ISA {
namespace {

using Eigen::Index;

// Applied to each finished block of the output while it is in cache.
struct Epilogue {
  const float* base;  // start of y, to find the place of a block in `mask`
  const float* bias;
  const float* mask;
  bool relu;

  template <class Mapper>
  EIGEN_ALWAYS_INLINE void operator()(const Mapper& block, const Eigen::TensorContractionParams&, Index first_channel,
                                      Index, Index channels, Index pixels) const {
    for (Index j = 0; j < pixels; ++j) {
      float* y = &block(0, j);
      if (bias != nullptr) {
        const float* b = bias + first_channel;
        for (Index c = 0; c < channels; ++c) y[c] += b[c];
      }
      if (relu) {
        for (Index c = 0; c < channels; ++c) y[c] = y[c] < 0.0f ? 0.0f : y[c];  // keeps NaN
      }
      if (mask != nullptr) {
        const float* m = mask + (y - base);
        for (Index c = 0; c < channels; ++c) y[c] = m[c] > 0.0f ? y[c] : 0.0f;
      }
    }
  }
};

class EigenPool : public Eigen::ThreadPoolInterface {
 public:
  explicit EigenPool(std::shared_ptr<HelpingQueue> queue) : queue_(std::move(queue)) {}
  void Schedule(std::function<void()> task) override { queue_->Schedule(std::move(task)); }
  int NumThreads() const override { return queue_->NumThreads(); }
  int CurrentThreadId() const override { return -1; }

 private:
  std::shared_ptr<HelpingQueue> queue_;
};

}  // namespace

void EigenConv(ThreadPool& pool, const ConvArgs& a) {
  using Tensor4 = Eigen::TensorMap<Eigen::Tensor<float, 4, Eigen::ColMajor, Index>>;
  // Column-major with reversed dimensions is row-major NHWC; Eigen's "rows" are then the width. Its packing code wants
  // maps of non-const floats but writes to neither input.
  const View<const float>& v = a.x[0];
  Tensor4 x(const_cast<float*>(v.data), v.c, v.w, v.h, a.n);
  Tensor4 kernel(const_cast<float*>(a.kernel), a.filters, v.c, a.kw, a.kh);
  Tensor4 y(a.y.data, a.y.c, a.y.w, a.y.h, a.n);
  const Index pad_bottom = (a.y.h - 1) * a.stride + a.kh - v.h - a.pad_top;
  const Index pad_right = (a.y.w - 1) * a.stride + a.kw - v.w - a.pad_left;
  auto convolution = Eigen::SpatialConvolution(x, kernel, a.stride, a.stride, Eigen::PADDING_VALID, 1, 1,
                                               Epilogue{a.y.data, a.bias, a.mask.data, a.relu}, a.pad_left, pad_right,
                                               a.pad_top, pad_bottom);
  auto queue = std::make_shared<HelpingQueue>(pool);
  EigenPool eigen_pool(queue);
  Eigen::ThreadPoolDevice device(&eigen_pool, pool.NumThreads());
  if (pool.NumThreads() == 1) {
    y.device(device) = convolution;
    return;
  }
  y.device(device, [queue] { queue->Finish(); }) = convolution;
  queue->RunUntilFinished();
}

}  // namespace unet_fast::cpu::UNET_FAST_ISA
