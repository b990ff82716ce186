"""Data: reading, checking, generating, augmenting and feeding images and masks."""

from unet_fast.data.augment import (
    Augmentation,
    augment_batch,
    augment_sample,
    augmentation_draws,
    center_crop,
    normalize,
    prepare_image,
    prepare_mask,
)
from unet_fast.data.dataset import Dataset, DatasetSpec
from unet_fast.data.folder import load_dataset
from unet_fast.data.formats import open_stack
from unet_fast.data.pipeline import TrainingBatches, evaluation_dataset, training_dataset
from unet_fast.data.png import read_png, write_png
from unet_fast.data.stack import Spacing
from unet_fast.data.synthetic import generate
from unet_fast.data.tiff import read_tiff, write_tiff

__all__ = [
    "Augmentation",
    "Dataset",
    "DatasetSpec",
    "Spacing",
    "TrainingBatches",
    "augment_batch",
    "augment_sample",
    "augmentation_draws",
    "center_crop",
    "evaluation_dataset",
    "generate",
    "load_dataset",
    "normalize",
    "open_stack",
    "prepare_image",
    "prepare_mask",
    "read_png",
    "read_tiff",
    "training_dataset",
    "write_png",
    "write_tiff",
]
