#include "conv/sm90/launch.h"

namespace unet_fast::gpu::sm90 {

int LaunchFloat16(void* stream, const KernelArgs& args, int config, bool transposed) {
  return transposed ? LaunchConfig<__half, true>(stream, args, config)
                    : LaunchConfig<__half, false>(stream, args, config);
}

}  // namespace unet_fast::gpu::sm90
