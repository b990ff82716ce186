// Lowering of UnetFastCast: on a CPU XLA's own conversions, which it fuses into what reads them.
#include "xla/lowering.h"

#include "tensorflow/compiler/tf2xla/type_util.h"

namespace unet_fast::cast_lowering {
namespace {

class Cast : public tensorflow::XlaOpKernel {
 public:
  explicit Cast(tensorflow::OpKernelConstruction* c) : XlaOpKernel(c), for_gpu_(ForGpu(c)) {}
  void Compile(tensorflow::XlaOpKernelContext* c) override {
    xla::PrimitiveType type;
    OP_REQUIRES_OK(c, tensorflow::DataTypeToPrimitiveType(c->expected_output_dtype(0), &type));
    if (!for_gpu_) {
      for (int i = 0; i < c->num_inputs(); ++i) c->SetOutput(i, xla::ConvertElementType(c->Input(i), type));
      return;
    }
    std::vector<xla::Shape> results;
    for (int i = 0; i < c->num_inputs(); ++i) results.push_back(RowMajor(type, ToDims(c->InputShape(i))));
    EmitCustomCall(c, "unet_fast_cast", Attributes(), results);
  }

 private:
  bool for_gpu_;
};

UNET_FAST_REGISTER_XLA("UnetFastCast", Cast);

}  // namespace
}  // namespace unet_fast::cast_lowering
