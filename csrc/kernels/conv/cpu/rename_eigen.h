// Renames namespace Eigen for one translation unit, so that builds for several instruction sets live in one library.
// UNET_FAST_ISA and UNET_FAST_EIGEN come from CMakeLists.txt.
#pragma once

#define Eigen UNET_FAST_EIGEN
