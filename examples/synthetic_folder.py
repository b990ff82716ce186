"""Writes a data folder of generated EM-like images and their masks, and some more to segment: synthetic_folder.py DIR.

DIR/images and DIR/masks get 20 PNG files of equal names, 256 x 256 pixels of 8 bits, masks of 0 (membrane) and 255
(cell); DIR/new gets 4 images of 300 x 400 pixels without masks.
"""

import pathlib
import sys

from unet_fast.data import synthetic, write_png

folder = pathlib.Path(sys.argv[1])
images, masks = synthetic.generate(num_images=20, size=(256, 256), seed=1)
new, _ = synthetic.generate(num_images=4, size=(300, 400), seed=2)
for name, pages in (("images", images[..., 0]), ("masks", masks * 255), ("new", new[..., 0])):
    (folder / name).mkdir(parents=True)
    for i, page in enumerate(pages):
        write_png(folder / name / f"section_{i:02d}.png", page)
    print(f"{folder / name}: {len(pages)} images of {pages.shape[1]} x {pages.shape[2]} pixels")
