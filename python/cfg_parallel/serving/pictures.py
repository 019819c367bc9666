"""Pictures that come in, whatever their sender wants with them, and those that go out."""

from __future__ import annotations

import base64
import binascii
import http.client
import io
import math
import struct
import time
import urllib.error
import urllib.request
from typing import TYPE_CHECKING

from cfg_parallel.errors import ConfigurationError
from cfg_parallel.serving.schemas import ApiError
from cfg_parallel.serving.work import Picture

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
_DAMAGED_EXIF = (AttributeError, KeyError, TypeError)
_FETCH_TIMEOUT = 5.0  # seconds without a byte
_FETCH_DEADLINE = 20.0  # seconds in all


def read(data: bytes, max_pixels: int, param: str) -> Image.Image:
    """An upright 8-bit RGB picture. Raises ApiError for what is none, is damaged, or would be larger than allowed;
    nothing is unpacked before its size is known."""
    from PIL import ImageOps

    from cfg_parallel.images import DAMAGED, to_rgb

    opened = _open(data, max_pixels, param)
    try:
        opened.load()
        return to_rgb(ImageOps.exif_transpose(opened))
    except (ConfigurationError, *_DAMAGED_EXIF, *DAMAGED) as error:
        raise _broken(param, error) from error


def read_mask(data: bytes, max_pixels: int, param: str = "mask") -> Image.Image:
    """A grey picture, white where it is to be painted anew, as in diffusers. OpenAI's masks are transparent there."""
    from PIL import ImageOps

    from cfg_parallel.images import DAMAGED

    opened = _open(data, max_pixels, param)
    try:
        opened.load()
        upright = ImageOps.exif_transpose(opened)
        if upright.has_transparency_data:
            return ImageOps.invert(upright.convert("RGBA").getchannel("A"))
        return upright.convert("L")
    except (*_DAMAGED_EXIF, *DAMAGED) as error:
        raise _broken(param, error) from error


def _open(data: bytes, max_pixels: int, param: str) -> Image.Image:
    from PIL import Image

    from cfg_parallel.images import DAMAGED

    if not data:
        raise ApiError(400, f"{param}: the picture is empty.", param=param, code="invalid_image")
    try:
        opened = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError as error:
        kinds = ", ".join(FORMATS)
        message = f"{param}: expected a picture ({kinds}), but got {len(data)} bytes of something else."
        raise ApiError(400, message, param=param, code="invalid_image") from error
    except Image.DecompressionBombError as error:  # Pillow's own limit, which may be lower
        raise _too_many_pixels(param, max_pixels) from error
    except (*DAMAGED, struct.error) as error:
        raise _broken(param, error) from error
    if math.prod(opened.size) > max_pixels:
        raise _too_many_pixels(param, max_pixels)
    return opened


def _too_many_pixels(param: str, most: int) -> ApiError:
    return ApiError(400, f"{param}: a picture may have at most {most} pixels.", param=param, code="image_too_large")


def _broken(param: str, error: Exception) -> ApiError:
    why = " ".join(str(error).split())[:200]
    return ApiError(400, f"{param}: the picture is damaged or cut short ({why}).", param=param, code="invalid_image")


def fetch(url: str, allow_remote: bool, max_bytes: int, param: str) -> bytes:
    """What a data: URL holds, or, where that is allowed, what is at an http(s) URL."""
    scheme, _, rest = url.partition(":")
    if scheme.lower() == "data":
        head, comma, body = rest.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise ApiError(400, f"{param}: expected data:image/...;base64,...", param=param, code="invalid_image_url")
        try:
            return base64.b64decode(body, validate=True)
        except (binascii.Error, ValueError) as error:
            raise ApiError(
                400, f"{param}: the base64 is broken ({error}).", param=param, code="invalid_base64"
            ) from error
    if scheme.lower() not in ("http", "https"):
        message = f"{param}: expected a data: URL, but got one of {scheme[:20]!r}."
        raise ApiError(400, message, param=param, code="invalid_image_url")
    if not allow_remote:
        message = f"{param}: only data: URLs are read; the server was started without --allow-remote-images."
        raise ApiError(400, message, param=param, code="remote_images_not_allowed")
    try:
        data, deadline = bytearray(), time.monotonic() + _FETCH_DEADLINE
        with urllib.request.urlopen(url, timeout=_FETCH_TIMEOUT) as answer:
            while len(data) <= max_bytes and (part := answer.read1(1 << 16)):
                data += part
                if time.monotonic() > deadline:
                    raise TimeoutError(f"not there after {_FETCH_DEADLINE:.0f} s")
    except (OSError, ValueError, http.client.HTTPException) as error:  # URLError and time-outs are OSErrors
        message = f"{param}: the picture cannot be fetched ({' '.join(str(error).split())[:200]})."
        raise ApiError(400, message, param=param, code="invalid_image_url") from error
    if len(data) > max_bytes:
        message = f"{param}: the picture at the URL has more than {max_bytes} bytes."
        raise ApiError(400, message, param=param, code="image_too_large")
    return bytes(data)


def encode(picture: Picture, output_format: str, compression: int) -> str:
    """Base64 of a file. `compression` is the quality of JPEG and WebP; PNG keeps every bit."""
    # PNG: more compression takes ten times as long for a tenth of the bytes.
    options = {"compress_level": 1} if output_format == "png" else {"quality": compression}
    file = io.BytesIO()
    picture.image().save(file, output_format.upper(), **options)
    return base64.b64encode(file.getvalue()).decode()
