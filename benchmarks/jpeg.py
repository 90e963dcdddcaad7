"""An image set saved as JPEG once more: `python -m benchmarks.jpeg NAME QUALITY` writes SIDAE_DATA/NAME_jpegQUALITY.npz.

Our CIFAR-10 is a JPEG copy, quality 75. Without the originals we cannot measure what that costs. We can measure a second loss
of about the same size. JPEG rounds in blocks of 8 x 8 pixels, in 16 x 16 for the colours. To round the same blocks twice
changes little, so the blocks are moved by four pixels.
"""

import io
import sys

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from sidae_lib import data, paths, train
from sidae_lib.config import SidaeError

MOVED = 4  # pixels


def again(image: np.ndarray, quality: int) -> np.ndarray:
    """uint8 (H, W, 3) -> the same shape: saved as JPEG (4:2:0, as Pillow does by default) with other blocks, and read."""
    with io.BytesIO() as file:
        Image.fromarray(np.pad(image, ((MOVED, MOVED), (MOVED, MOVED), (0, 0)), "edge")).save(file, "JPEG", quality=quality)
        return np.asarray(Image.open(file))[MOVED:-MOVED, MOVED:-MOVED]


def write(name: str, quality: int) -> None:
    """Writes the set; a grey one gets three channels. Raises SidaeError for a set that is not there."""
    images, arrays = data.load(name), {}
    for split, part in images.splits.items():
        x = part.images.permute(0, 2, 3, 1).numpy()  # (N, H, W, 3)
        new = np.stack([again(image, quality) for image in tqdm(x, split)])
        change = np.sqrt(np.square(new.astype(np.float32) - x).mean())
        print(f"{split}: {len(x):,} images, pixels change by {change:.1f} of 255 (root of the mean square).")
        arrays[f"{split}_images"] = new
        if part.labels is not None:
            arrays[f"{split}_labels"] = part.labels.numpy()
    with io.BytesIO() as file:
        np.savez(file, classes=np.array(images.classes), **arrays)
        train.write(paths.data() / f"{name}_jpeg{quality}.npz", file.getvalue())


if __name__ == "__main__":
    try:
        name, quality = sys.argv[1], int(sys.argv[2])
        if not 1 <= quality <= 95:
            raise ValueError
    except (IndexError, ValueError):
        sys.exit("usage: python -m benchmarks.jpeg NAME QUALITY, an image set and a JPEG quality from 1 to 95")
    try:
        write(name, quality)
    except SidaeError as e:
        sys.exit(str(e))
