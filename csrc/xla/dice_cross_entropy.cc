// Lowering of UnetFastDiceCrossEntropy and its gradient.
#include <tuple>

#include "xla/lowering.h"
#ifdef UNET_FAST_CUDA
#include "loss/gpu.h"
#endif

namespace unet_fast::dice_cross_entropy_lowering {
namespace {

class Base : public tensorflow::XlaOpKernel {
 public:
  explicit Base(tensorflow::OpKernelConstruction* c) : XlaOpKernel(c) {
    float dice_weight, ce_weight, smooth, label_smoothing;
    int64_t ignore_class;
    bool has_ignore_class, include_background, squared;
    OP_REQUIRES_OK(c, c->GetAttr("dice_weight", &dice_weight));
    OP_REQUIRES_OK(c, c->GetAttr("ce_weight", &ce_weight));
    OP_REQUIRES_OK(c, c->GetAttr("smooth", &smooth));
    OP_REQUIRES_OK(c, c->GetAttr("label_smoothing", &label_smoothing));
    OP_REQUIRES_OK(c, c->GetAttr("has_ignore_class", &has_ignore_class));
    OP_REQUIRES_OK(c, c->GetAttr("ignore_class", &ignore_class));
    OP_REQUIRES_OK(c, c->GetAttr("include_background", &include_background));
    OP_REQUIRES_OK(c, c->GetAttr("squared", &squared));
    attributes_.Float("dice_weight", dice_weight)
        .Float("ce_weight", ce_weight)
        .Float("smooth", smooth)
        .Float("label_smoothing", label_smoothing)
        .Int("has_ignore_class", has_ignore_class)
        .Int("ignore_class", ignore_class)
        .Int("include_background", include_background)
        .Int("squared", squared);
    for_gpu_ = ForGpu(c);
  }

 protected:
  // labels, logits and class_weights are operands `first` on; gives the logits' shape.
  bool CheckInputs(tensorflow::XlaOpKernelContext* c, int first, Dims* logits) const {
    *logits = ToDims(c->InputShape(first + 1));
    std::string error;
    if (logits->size() < 2 || logits->back() < 1) {
      error = "logits: expected a shape [batch, ..., classes], got " + ToString(*logits);
    } else {
      error = CheckDims("labels", ToDims(c->InputShape(first)), Dims(logits->begin(), logits->end() - 1));
    }
    if (error.empty()) error = CheckDims("class_weights", ToDims(c->InputShape(first + 2)), {logits->back()});
    const absl::Status status = Invalid("dice_cross_entropy", error);
    if (!status.ok()) c->CtxFailure(status);
    return status.ok();
  }
  Attributes attributes_;
  bool for_gpu_ = false;
};

class Forward : public Base {
 public:
  using Base::Base;
  void Compile(tensorflow::XlaOpKernelContext* c) override {
    Dims logits;
    if (!CheckInputs(c, 0, &logits)) return;
    std::vector<xla::Shape> results = {RowMajor(xla::F32, {logits[0]}),
                                       RowMajor(xla::F32, {logits[0], 3, logits.back()}),
                                       RowMajor(xla::F32, {logits[0], 2})};
#ifdef UNET_FAST_CUDA
    if (for_gpu_) {
      DiceCrossEntropyProblem p;
      p.dtype = ToDType(c->input_type(1));
      p.batch = logits.front(), p.classes = logits.back(), p.pixels = 1;
      for (size_t i = 1; i + 1 < logits.size(); ++i) p.pixels *= logits[i];
      results.push_back(Workspace(gpu::DiceCrossEntropyWorkspaceBytes(p)));
    }
#endif
    EmitCustomCall(c, "unet_fast_dice_cross_entropy", attributes_, results);
  }
};

class Grad : public Base {
 public:
  using Base::Base;
  void Compile(tensorflow::XlaOpKernelContext* c) override {
    Dims logits;
    if (!CheckInputs(c, 1, &logits)) return;
    const std::tuple<int, const char*, Dims> expected[] = {
        {0, "dloss", {logits[0]}}, {4, "sums", {logits[0], 3, logits.back()}}, {5, "ce", {logits[0], 2}}};
    for (const auto& [input, name, dims] : expected) {
      OP_REQUIRES_OK(c, Invalid("dice_cross_entropy gradient", CheckDims(name, ToDims(c->InputShape(input)), dims)));
    }
    EmitCustomCall(c, "unet_fast_dice_cross_entropy_grad", attributes_, {RowMajor(c->input_xla_type(2), logits)});
  }
};

UNET_FAST_REGISTER_XLA("UnetFastDiceCrossEntropy", Forward);
UNET_FAST_REGISTER_XLA("UnetFastDiceCrossEntropyGrad", Grad);

}  // namespace
}  // namespace unet_fast::dice_cross_entropy_lowering
