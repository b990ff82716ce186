"""The U-Net and its geometry."""

from unet_fast.models.geometry import output_size
from unet_fast.models.unet import FusedUNet

__all__ = ["FusedUNet", "output_size"]
