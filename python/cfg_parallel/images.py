"""Reading a picture whatever its format, and refusing an output file that could not be written."""

from __future__ import annotations

import io
import os
import struct
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps

from cfg_parallel.errors import ConfigurationError

# What Pillow raises for a file that is cut short or damaged; it depends on the format's plugin.
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, Image.DecompressionBombError)


def load_image(path: str | os.PathLike[str]) -> Image.Image:
    """The picture in `path` as 8-bit RGB, upright (EXIF orientation applied). Transparent parts become white, more
    than 8 bits a channel are scaled to 8, and an animation gives its first frame. Raises `ConfigurationError` for a
    file that is missing, is no picture or is damaged."""
    path = Path(path)
    if not path.exists():
        raise ConfigurationError(f"there is no image {path}: check the path given to --image.")
    if path.is_dir():
        raise ConfigurationError(f"{path} is a folder: give --image the picture itself.")
    try:
        with Image.open(path) as opened:
            opened.load()
            return to_rgb(ImageOps.exif_transpose(opened))
    except ConfigurationError:
        raise
    except PermissionError as error:
        raise ConfigurationError(f"the image {path} may not be read: check its permissions.") from error
    except Image.UnidentifiedImageError as error:
        raise ConfigurationError(
            f"{path} is no picture that Pillow can read ({path.stat().st_size} bytes): convert it to PNG or JPEG."
        ) from error
    except DAMAGED as error:
        raise ConfigurationError(
            f"the image {path} is damaged or cut short ({error}): copy or export it again."
        ) from error


def to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_to_8_bit(np.asarray(image), image.mode)).convert("RGB")
    if image.mode == "LAB":  # the one mode that convert() leaves to a colour profile
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        if converted is None:
            raise ValueError("no conversion from LAB to RGB")
        return converted
    if image.has_transparency_data:  # an alpha channel, or one palette entry or colour declared transparent
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _to_8_bit(pixels: np.ndarray, mode: str) -> np.ndarray:
    """Grey values of 16 bits, 32 bits or floating point as 8 bits. Pillow's own convert() clips them, which turns
    nearly every 16-bit picture white. Modes `I` and `F` carry no range, so the smallest usual one that holds them is
    taken."""
    low, high = float(pixels.min()), float(pixels.max())
    ranges = {"F": (1.0, 255.0), "I": (255.0, 65535.0, 2.0**31 - 1)}.get(mode, (65535.0,))
    top = next((top for top in ranges if low >= 0 and high <= top), None)  # None for NaN, too
    if top is None:
        raise ConfigurationError(
            f"the image holds grey values from {low:g} to {high:g}: scale them to 0..{ranges[0]:g} and save it again."
        )
    return np.rint(pixels.astype(np.float64) * (255.0 / top)).astype(np.uint8)


def check_output(path: str | os.PathLike[str]) -> None:
    """Raise `ConfigurationError` unless an RGB picture can be saved as `path`. Nothing is written."""
    path = Path(path)
    if path.is_dir():
        raise ConfigurationError(f"{path} is a folder: give --output a file name, such as {path / 'out.png'}.")
    folder = path.parent
    if not folder.is_dir():
        raise ConfigurationError(f"the output folder {folder} does not exist: create it or change --output.")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise ConfigurationError(f"{path} may not be written: check the permissions or change --output.")
    name = Image.registered_extensions().get(path.suffix.lower())
    if name is None:
        said = f"the suffix {path.suffix}" if path.suffix else "a name without a suffix"
        raise ConfigurationError(f"Pillow cannot write {said}: end --output in .png, .jpg or .webp.")
    try:
        # A trial, because a known suffix is not enough: the plugin may only read, or only write other modes than RGB.
        Image.new("RGB", (64, 64)).save(io.BytesIO(), format=name)
    except (OSError, KeyError, ValueError) as error:
        raise ConfigurationError(
            f"Pillow cannot write {path.suffix} ({error}): end --output in .png, .jpg or .webp."
        ) from error
