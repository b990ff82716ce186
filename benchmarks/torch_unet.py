"""The peer in PyTorch: the same network, loss and optimizer, the way PyTorch's own guides make them fast.

Automatic mixed precision in float16 with a gradient scaler, channels_last, cuDNN's kernels chosen by trial, Adam in one
fused kernel, which also unscales the gradients; compiled, network and loss in one graph, in the default mode. Weights are
float32, in prediction too, as in every other system here.
"""

import torch
import torch.nn.functional as F
from timing import INPUTS
from torch import nn


class DoubleConv(nn.Sequential):
    """Two 3x3 convolutions without padding, each with ReLU."""

    def __init__(self, channels, filters):
        super().__init__(
            nn.Conv2d(channels, filters, 3),
            nn.ReLU(inplace=True),
            nn.Conv2d(filters, filters, 3),
            nn.ReLU(inplace=True),
        )


class UNet(nn.Module):
    """UNet_Medical's network; `unet_fast.FusedUNet()` is the same.

    Args:
        filters: channels of the first level.
        depth: how many times the image is halved.

    Input: images [N, 1, H, W]. Output: logits [N, 2, H', W'].

    >>> UNet(filters=2, depth=2)(torch.zeros(1, 1, 60, 60)).shape
    torch.Size([1, 2, 20, 20])
    """

    def __init__(self, filters=64, depth=4):
        super().__init__()
        widths = [filters * 2**level for level in range(depth + 1)]
        self.down = nn.ModuleList(DoubleConv(a, b) for a, b in zip([1, *widths], widths[:-1], strict=False))
        self.bottom = DoubleConv(widths[-2], widths[-1])
        self.dropout = nn.Dropout(0.5)
        # Output sizes are exactly twice the input's, as those of Keras' "same".
        self.transpose = nn.ModuleList(
            nn.ConvTranspose2d(2 * width, width, 3, stride=2, padding=1, output_padding=1) for width in widths[-2::-1]
        )
        self.up = nn.ModuleList(DoubleConv(2 * width, width) for width in widths[-2::-1])
        self.logits = nn.Conv2d(filters, 2, 1)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
            else:
                nn.init.zeros_(parameter)

    def forward(self, x):
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.dropout(self.bottom(x))
        for transpose, block, skip in zip(self.transpose, self.up, reversed(skips), strict=True):
            x = F.relu(transpose(x), inplace=True)
            top, left = (skip.shape[2] - x.shape[2]) // 2, (skip.shape[3] - x.shape[3]) // 2
            skip = skip[:, :, top : top + x.shape[2], left : left + x.shape[3]]
            x = block(torch.cat([x, skip], 1))
        return self.logits(x)


def dice_cross_entropy(logits, labels, smooth=1e-6):
    """Mean cross entropy plus 1 - soft Dice, in float32; `unet_fast.reference.dice_cross_entropy`'s mean over the batch.

    Args:
        logits: [N, K, H, W] of any float dtype.
        labels: [N, H, W] integers.
        smooth: added above and below Dice's fraction bar.

    >>> logits = torch.tensor([50.0, 0.0]).view(1, 2, 1, 1).expand(3, 2, 4, 4)
    >>> dice_cross_entropy(logits, torch.zeros(3, 4, 4, dtype=torch.int32)).item()
    0.0
    """
    log_p = logits.float().log_softmax(1)
    classes = torch.arange(logits.shape[1], device=logits.device).view(1, -1, 1, 1)
    t = (labels.unsqueeze(1) == classes).float()
    p = log_p.exp()
    ce = -(t * log_p).sum(1).mean()
    intersection, sizes = (p * t).sum((2, 3)), (p * p + t).sum((2, 3))  # t is its own square
    return ce + (1 - (2 * intersection + smooth) / (sizes + smooth)).mean()


class System:
    """The training step or the prediction as a system that timing.py can time.

    Args:
        phase: "train" or "infer".
        batch: images a step.
        compiled: whether torch.compile compiles it.
        device: to run on.
        size: side of the images.
        filters: of the network.
    """

    def __init__(self, phase, batch, *, compiled, device="cuda", size=572, filters=64):
        torch.manual_seed(0)
        torch.backends.cudnn.benchmark = True
        self._amp = torch.amp.autocast(device, torch.float16)
        self._model = UNet(filters).to(device, memory_format=torch.channels_last)
        # Laid out by hand: an image of one channel counts as contiguous in every memory format and would be left as it is.
        images = [torch.randn(batch, size, size, 1, device=device).permute(0, 3, 1, 2) for _ in range(INPUTS)]
        if phase == "train":
            with torch.device("meta"):
                sides = UNet(filters)(torch.empty(1, 1, size, size)).shape[2:]
            self._data = [(x, torch.randint(0, 2, (batch, *sides), device=device, dtype=torch.int32)) for x in images]
            # Its weight_decay is added to the gradient: the term weight_decay / 2 * |w|^2 of the loss, biases too.
            self._optimizer = torch.optim.Adam(self._model.parameters(), 1e-4, weight_decay=5e-4, fused=True)
            self._scaler = torch.amp.GradScaler(device)
            self._loss = torch.compile(self._forward_loss) if compiled else self._forward_loss
            self._step = self._train
        else:
            self._model.eval()
            self._data = [(x,) for x in images]
            self._predict = torch.compile(self._forward) if compiled else self._forward
            self._step = torch.inference_mode()(lambda x: self._predict(x))

    def _forward(self, images):
        with self._amp:
            return self._model(images)

    def _forward_loss(self, images, labels):
        return dice_cross_entropy(self._forward(images), labels)

    def _train(self, images, labels):
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._loss(images, labels)
        self._scaler.scale(loss).backward()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        return loss.detach()

    def step(self, i):
        return self._step(*self._data[i])

    def wait(self):
        torch.cuda.synchronize()

    def reset_peak(self):
        torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self):
        return torch.cuda.max_memory_allocated()
