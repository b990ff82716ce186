// UnetFastDiceCrossEntropy and its gradient: definition, shape functions, CPU and GPU kernels.
#include "loss/dice_cross_entropy.h"

#include "tensorflow/common.h"
#include "tensorflow/core/framework/op.h"
#ifdef UNET_FAST_CUDA
#include "loss/gpu.h"
#endif

namespace unet_fast::dice_cross_entropy_kernels {
namespace {

using tensorflow::OpKernel;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;
using tensorflow::TensorShape;
using tensorflow::shape_inference::DimensionHandle;
using tensorflow::shape_inference::InferenceContext;
using tensorflow::shape_inference::ShapeHandle;

absl::Status ForwardShape(InferenceContext* c) {
  const auto named = [](const char* expected, const absl::Status& status) {
    return Named("dice_cross_entropy", expected, status);
  };
  ShapeHandle labels, logits, leading, weights;
  TF_RETURN_IF_ERROR(
      named("logits: expected a shape [batch, ..., classes]", c->WithRankAtLeast(c->input(1), 2, &logits)));
  TF_RETURN_IF_ERROR(c->Subshape(logits, 0, -1, &leading));
  TF_RETURN_IF_ERROR(
      named("labels: expected the logits' shape without the classes", c->Merge(c->input(0), leading, &labels)));
  TF_RETURN_IF_ERROR(named("class_weights: expected a shape [classes]", c->WithRank(c->input(2), 1, &weights)));
  DimensionHandle classes, batch = c->RankKnown(labels) ? c->Dim(labels, 0) : c->UnknownDim();
  TF_RETURN_IF_ERROR(
      named("class_weights: expected a weight a class",
            c->Merge(c->RankKnown(logits) ? c->Dim(logits, -1) : c->UnknownDim(), c->Dim(weights, 0), &classes)));
  c->set_output(0, c->Vector(batch));
  c->set_output(1, c->MakeShape({batch, c->MakeDim(3), classes}));
  c->set_output(2, c->MakeShape({batch, c->MakeDim(2)}));
  return absl::OkStatus();
}

class Base : public OpKernel {
 public:
  explicit Base(OpKernelConstruction* c) : OpKernel(c) {
    OP_REQUIRES_OK(c, c->GetAttr("dice_weight", &flags_.dice_weight));
    OP_REQUIRES_OK(c, c->GetAttr("ce_weight", &flags_.ce_weight));
    OP_REQUIRES_OK(c, c->GetAttr("smooth", &flags_.smooth));
    OP_REQUIRES_OK(c, c->GetAttr("label_smoothing", &flags_.label_smoothing));
    OP_REQUIRES_OK(c, c->GetAttr("has_ignore_class", &flags_.has_ignore_class));
    OP_REQUIRES_OK(c, c->GetAttr("ignore_class", &flags_.ignore_class));
    OP_REQUIRES_OK(c, c->GetAttr("include_background", &flags_.include_background));
    OP_REQUIRES_OK(c, c->GetAttr("squared", &flags_.squared));
  }

 protected:
  absl::Status Problem(const Tensor& labels, const Tensor& logits, const Tensor& class_weights,
                       DiceCrossEntropyProblem* p) const {
    *p = flags_;
    p->dtype = ToDType(logits.dtype());
    p->label_type = labels.dtype() == tensorflow::DT_UINT8   ? LabelType::kUInt8
                    : labels.dtype() == tensorflow::DT_INT32 ? LabelType::kInt32
                                                             : LabelType::kInt64;
    Dims leading = ToDims(logits.shape());
    if (leading.size() < 2 || leading.back() < 1) {
      return Invalid(kOp, "logits: expected a shape [batch, ..., classes], got " + ToString(leading));
    }
    p->batch = leading.front(), p->classes = leading.back();
    leading.pop_back();
    p->pixels = 1;
    for (size_t i = 1; i < leading.size(); ++i) p->pixels *= leading[i];
    TF_RETURN_IF_ERROR(Invalid(kOp, CheckDims("labels", ToDims(labels.shape()), leading)));
    return Invalid(kOp, CheckDims("class_weights", ToDims(class_weights.shape()), {p->classes}));
  }
  static constexpr const char* kOp = "dice_cross_entropy";
  DiceCrossEntropyProblem flags_;
};

template <bool kGpu>
class Forward : public Base {
 public:
  using Base::Base;
  void Compute(OpKernelContext* c) override {
    const Tensor &labels = c->input(0), &logits = c->input(1), &class_weights = c->input(2);
    DiceCrossEntropyProblem p;
    OP_REQUIRES_OK(c, Problem(labels, logits, class_weights, &p));
    Tensor *loss = nullptr, *sums = nullptr, *ce = nullptr;
    OP_REQUIRES_OK(c, c->allocate_output(0, TensorShape({p.batch}), &loss));
    OP_REQUIRES_OK(c, c->allocate_output(1, TensorShape({p.batch, 3, p.classes}), &sums));
    OP_REQUIRES_OK(c, c->allocate_output(2, TensorShape({p.batch, 2}), &ce));
    const float* weights = class_weights.flat<float>().data();
    float *loss_data = loss->flat<float>().data(), *sums_data = sums->flat<float>().data();
    float* ce_data = ce->flat<float>().data();
    if constexpr (kGpu) {
#ifdef UNET_FAST_CUDA
      Tensor storage;
      void* workspace;
      OP_REQUIRES_OK(c, GpuWorkspace(c, gpu::DiceCrossEntropyWorkspaceBytes(p), &storage, &workspace));
      OP_REQUIRES_OK(c, GpuStatus(kOp, gpu::DiceCrossEntropy(GpuStream(c), p, labels.data(), logits.data(), weights,
                                                             loss_data, sums_data, ce_data, workspace)));
#endif
    } else {
      OpThreadPool pool(c);
      const BadLabel bad =
          cpu::DiceCrossEntropy(pool, p, labels.data(), logits.data(), weights, loss_data, sums_data, ce_data);
      OP_REQUIRES_OK(c, Invalid(kOp, bad.Message(p)));
    }
  }
};

template <bool kGpu>
class Grad : public Base {
 public:
  using Base::Base;
  void Compute(OpKernelContext* c) override {
    const Tensor &dloss = c->input(0), &labels = c->input(1), &logits = c->input(2), &class_weights = c->input(3);
    const Tensor &sums = c->input(4), &ce = c->input(5);
    DiceCrossEntropyProblem p;
    OP_REQUIRES_OK(c, Problem(labels, logits, class_weights, &p));
    OP_REQUIRES_OK(c, Invalid(kOp, CheckDims("dloss", ToDims(dloss.shape()), {p.batch})));
    OP_REQUIRES_OK(c, Invalid(kOp, CheckDims("sums", ToDims(sums.shape()), {p.batch, 3, p.classes})));
    OP_REQUIRES_OK(c, Invalid(kOp, CheckDims("ce", ToDims(ce.shape()), {p.batch, 2})));
    Tensor* dlogits = nullptr;
    OP_REQUIRES_OK(c, c->allocate_output(0, logits.shape(), &dlogits));
    const float *dloss_data = dloss.flat<float>().data(), *weights = class_weights.flat<float>().data();
    const float *sums_data = sums.flat<float>().data(), *ce_data = ce.flat<float>().data();
    if constexpr (kGpu) {
#ifdef UNET_FAST_CUDA
      OP_REQUIRES_OK(c,
                     GpuStatus(kOp, gpu::DiceCrossEntropyGrad(GpuStream(c), p, dloss_data, labels.data(), logits.data(),
                                                              weights, sums_data, ce_data, dlogits->data())));
#endif
    } else {
      OpThreadPool pool(c);
      cpu::DiceCrossEntropyGrad(pool, p, dloss_data, labels.data(), logits.data(), weights, sums_data, ce_data,
                                dlogits->data());
    }
  }
};

#define UNET_FAST_LOSS_ATTRIBUTES              \
  Attr("T: {float, half, bfloat16}")           \
      .Attr("Labels: {uint8, int32, int64}")   \
      .Attr("dice_weight: float = 1.0")        \
      .Attr("ce_weight: float = 1.0")          \
      .Attr("smooth: float = 1e-6")            \
      .Attr("label_smoothing: float = 0.0")    \
      .Attr("has_ignore_class: bool = false")  \
      .Attr("ignore_class: int = 0")           \
      .Attr("include_background: bool = true") \
      .Attr("squared: bool = true")

REGISTER_OP("UnetFastDiceCrossEntropy")
    .Input("labels: Labels")
    .Input("logits: T")
    .Input("class_weights: float")
    .Output("loss: float")
    .Output("sums: float")
    .Output("ce: float")
    .UNET_FAST_LOSS_ATTRIBUTES.SetShapeFn(ForwardShape);

REGISTER_OP("UnetFastDiceCrossEntropyGrad")
    .Input("dloss: float")
    .Input("labels: Labels")
    .Input("logits: T")
    .Input("class_weights: float")
    .Input("sums: float")
    .Input("ce: float")
    .Output("dlogits: T")
    .UNET_FAST_LOSS_ATTRIBUTES.SetShapeFn([](InferenceContext* c) {
      c->set_output(0, c->input(2));
      return absl::OkStatus();
    });

UNET_FAST_REGISTER_KERNELS("UnetFastDiceCrossEntropy", Forward);
UNET_FAST_REGISTER_KERNELS("UnetFastDiceCrossEntropyGrad", Grad);

}  // namespace
}  // namespace unet_fast::dice_cross_entropy_kernels
