"""Writes generated EM-like images, none of which training has seen, as a multi-page TIFF: synthetic_images.py FILE."""

import sys

import tifffile

from unet_fast.data import synthetic

images, _ = synthetic.generate(num_images=4, size=(200, 300), seed=12345)
tifffile.imwrite(sys.argv[1], images[..., 0], photometric="minisblack")
print(f"{sys.argv[1]}: {images.shape[0]} images of {images.shape[1]} x {images.shape[2]} pixels")
