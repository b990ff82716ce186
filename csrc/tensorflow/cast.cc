// UnetFastCast: definition, shape function, CPU and GPU kernels.
#include "tensorflow/common.h"
#include "tensorflow/core/framework/op.h"
#ifdef UNET_FAST_CUDA
#include "cast/gpu.h"
#endif

namespace unet_fast::cast_kernels {
namespace {

using tensorflow::OpKernel;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;
using tensorflow::shape_inference::InferenceContext;

template <bool kGpu>
class Cast : public OpKernel {
 public:
  explicit Cast(OpKernelConstruction* c) : OpKernel(c) { OP_REQUIRES_OK(c, c->GetAttr("T", &type_)); }
  void Compute(OpKernelContext* c) override {
#ifdef UNET_FAST_CUDA
    std::vector<gpu::CastArray> arrays;
#endif
    for (int i = 0; i < c->num_inputs(); ++i) {
      const Tensor& x = c->input(i);
      Tensor* y = nullptr;
      OP_REQUIRES_OK(c, c->allocate_output(i, x.shape(), &y));
      if constexpr (kGpu) {
#ifdef UNET_FAST_CUDA
        arrays.push_back({x.data(), y->data(), x.NumElements()});
#endif
      } else if (type_ == tensorflow::DT_HALF) {
        y->flat<Eigen::half>() = x.flat<float>().cast<Eigen::half>();
      } else {
        y->flat<Eigen::bfloat16>() = x.flat<float>().cast<Eigen::bfloat16>();
      }
    }
#ifdef UNET_FAST_CUDA
    if constexpr (kGpu) OP_REQUIRES_OK(c, GpuStatus("cast", gpu::Cast(GpuStream(c), ToDType(type_), arrays)));
#endif
  }

 private:
  tensorflow::DataType type_;
};

REGISTER_OP("UnetFastCast")
    .Input("x: N * float")
    .Output("y: N * T")
    .Attr("T: {half, bfloat16}")
    .Attr("N: int >= 1")
    .SetShapeFn([](InferenceContext* c) {
      for (int i = 0; i < c->num_inputs(); ++i) c->set_output(i, c->input(i));
      return absl::OkStatus();
    });

UNET_FAST_REGISTER_KERNELS("UnetFastCast", Cast);

}  // namespace
}  // namespace unet_fast::cast_kernels
