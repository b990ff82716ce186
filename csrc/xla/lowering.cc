#include "xla/lowering.h"

#include <cstring>

#include "absl/strings/str_format.h"
#include "xla/hlo/builder/xla_builder.h"
#include "xla/shape_util.h"

namespace unet_fast {

Attributes& Attributes::Add(const std::string& entry) {
  text_ += (text_.empty() ? "" : ", ") + entry;
  return *this;
}
Attributes& Attributes::Int(const char* name, int64_t value) {
  return Add(absl::StrFormat("%s = %d : i64", name, value));
}
Attributes& Attributes::Float(const char* name, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return Add(absl::StrFormat("%s = 0x%08X : f32", name, bits));
}

xla::Shape RowMajor(xla::PrimitiveType type, const Dims& dims) {
  return xla::ShapeUtil::MakeShapeWithDescendingLayout(type, dims);
}

void EmitCustomCall(tensorflow::XlaOpKernelContext* context, const char* target, const Attributes& attributes,
                    const std::vector<xla::Shape>& results) {
  std::vector<xla::XlaOp> operands;
  std::vector<xla::Shape> operand_shapes;
  for (int i = 0; i < context->num_inputs(); ++i) {
    operands.push_back(context->Input(i));
    operand_shapes.push_back(RowMajor(context->input_xla_type(i), ToDims(context->InputShape(i))));
  }
  const bool tuple = results.size() > 1;
  const xla::XlaOp call = xla::CustomCallWithLayout(
      context->builder(), target, operands, tuple ? xla::ShapeUtil::MakeTupleShape(results) : results[0],
      operand_shapes,
      /*opaque=*/attributes.Text(), /*has_side_effect=*/false, /*output_operand_aliasing=*/{}, /*literal=*/nullptr,
      xla::CustomCallSchedule::SCHEDULE_NONE, xla::CustomCallApiVersion::API_VERSION_TYPED_FFI);
  for (int i = 0; i < context->num_outputs(); ++i) context->SetOutput(i, tuple ? xla::GetTupleElement(call, i) : call);
}

}  // namespace unet_fast
