"""The datasets: shapes, CIFAR-10, CelebA and any folder of images; decoded, cached, ordered and fed to the device."""

from .decode import BadFiles, Decoder
from .feed import Feed
from .identity import Identity
from .images import Images
from .loading import Loading
from .open import IN_MEMORY, decode_files, open_images, open_training, open_tree

__all__ = [
    "IN_MEMORY", "BadFiles", "Decoder", "Feed", "Identity", "Images", "Loading",
    "decode_files", "open_images", "open_training", "open_tree",
]  # fmt: skip
