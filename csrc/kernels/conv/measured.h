// What the products of UNet_Medical's network, a batch of 8 and of 1, were fastest on, on an NVIDIA H200,
// where that is not what the rules say. In the format of a tuning file (tuning.cu), its type left out: bfloat16 takes
// the same time. Written by benchmarks/measured_table.py.
#pragma once

namespace unet_fast::gpu {

constexpr char kMeasured[] = R"(unet_fast tuning 1
product 1x100x100x256/1 > 102x102x256, 9 taps from 0, transposed	cudnn	0	0
product 1x136x136x256/1 > 138x138x256, 9 taps from 0, transposed	cudnn	1	0
product 1x138x138x256/1 > 140x140x128, 9 taps from 0, transposed	cudnn	1	0
product 1x200x200x128/2 > 100x100x256, 9 taps from 0	sm90	6	0
product 1x30x30x1024/1 > 32x32x512, 9 taps from 0, transposed	cudnn	1	0
product 1x392x392x64/2 > 196x196x128, 9 taps from 0	sm90	6	0
product 1x64x64x512/1 > 66x66x512, 9 taps from 0, transposed	cudnn	0	0
product 1x66x66x512/1 > 68x68x256, 9 taps from 0, transposed	cudnn	0	0
product 1x68x68x256/1 > 66x66x512, 9 taps from 0, bias, relu	cudnn	1	0
product 8x102x102x256/1 > 100x100x256, 9 taps from 0, bias, relu	cudnn	0	0
product 8x104x104x256/2 > 52x52x512, 9 taps from 0	sm90	7	0
product 8x136x136x256/1 > 138x138x256, 9 taps from 0, transposed	sm90	7	0
product 8x140x140x128/1 > 138x138x256, 9 taps from 0, bias, relu	cudnn	0	0
product 8x30x30x1024/1 > 28x28x1024, 9 taps from 0, bias, relu	cudnn	0	0
product 8x64x64x512/1 > 66x66x512, 9 taps from 0, transposed	sm90	0	0
product 8x66x66x512/1 > 68x68x256, 9 taps from 0, transposed	cudnn	1	0
weights 1x102x102x256/1 > 100x100x256, 9 taps from 0	sm90	5	8
weights 1x140x140x128/1 > 138x138x256, 9 taps from 0	sm90	4	11
weights 1x198x198x128/1 > 196x196x128, 9 taps from 0	sm90	4	22
weights 1x282x282x128/1 > 280x280x128, 9 taps from 0	sm90	5	33
weights 1x284x284x64/1 > 282x282x128, 9 taps from 0	sm90	4	43
weights 1x30x30x1024/1 > 28x28x1024, 9 taps from 0	sm90	2	1
weights 1x54x54x512/1 > 52x52x512, 9 taps from 0	sm90	5	2
weights 1x56x56x512/2 > 28x28x1024, 9 taps from 0	cudnn	1	0
weights 1x68x68x256/1 > 66x66x512, 9 taps from 0	sm90	4	2
weights 8x104x104x256/2 > 52x52x512, 9 taps from 0	cudnn	1	0
weights 8x392x392x64/2 > 196x196x128, 9 taps from 0	cudnn	0	0
weights 8x66x66x512/1 > 64x64x512, 9 taps from 0	cudnn	0	0
)";

}  // namespace unet_fast::gpu
