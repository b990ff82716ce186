#include "conv/sm90/launch.h"

namespace unet_fast::gpu::sm90 {

int LaunchBFloat16(void* stream, const KernelArgs& args, int config, bool transposed) {
  return transposed ? LaunchConfig<__nv_bfloat16, true>(stream, args, config)
                    : LaunchConfig<__nv_bfloat16, false>(stream, args, config);
}

}  // namespace unet_fast::gpu::sm90
