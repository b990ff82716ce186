// Of the cudnn engine, for whoever counts its configurations.
#pragma once

namespace unet_fast::gpu::cudnn {

constexpr int kPlans = 4;  // of what cuDNN's heuristic proposes, that are worth a measurement

}  // namespace unet_fast::gpu::cudnn
