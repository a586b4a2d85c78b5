"""Finds bad files before the training begins: by their first and last bytes, and in doubt by decoding them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from fastle.config import Size
from fastle.files import open_regular

from .decode import MAX_BYTES, BadFiles, Decoder, DiskFile, ImageFile, check_size, default_threads
from .header import looks_complete, read_header
from .loading import Loading
from .pillow import NotInstalled

HEAD, TAIL = 65_536, 64  # bytes that are read of each file
CHUNK = 256  # files


def find_faults(
    files: Sequence[ImageFile], decoder: Decoder, loading: Loading, *, size: Size, resize: bool, upscale: bool
) -> dict[int, str]:
    """Finds the bad files that can be found without decoding every file.

    Args:
        files: The files of a split.
        decoder: Decodes the files whose first and last bytes leave doubts.
        loading: Shows the progress, and counts the files.
        size, resize, upscale: See `TorchvisionDecoder`.

    Returns:
        Messages "NAME fault", by the position of the file.
    """
    faults: dict[int, str] = {}
    doubtful: list[int] = []
    check = partial(_check_file, loading=loading, size=size, resize=resize, upscale=upscale)
    with ThreadPoolExecutor(default_threads(), thread_name_prefix="check") as pool:
        starts = range(0, len(files), CHUNK)
        for start in loading.track(starts, "checking the images", len(starts)):
            results = pool.map(check, files[start : start + CHUNK])
            for position, fault in enumerate(results, start):
                if fault is None:
                    doubtful.append(position)
                elif fault:
                    faults[position] = f"{files[position].name} {fault}"
    for start in range(0, len(doubtful), CHUNK):
        positions = doubtful[start : start + CHUNK]
        try:
            decoder([files[position] for position in positions])
        except BadFiles as bad:
            faults |= {positions[within]: fault for within, fault in bad.faults.items()}
    return faults


def _check_file(file: ImageFile, *, loading: Loading, size: Size, resize: bool, upscale: bool) -> str | None:
    """The fault of a file, "" if it has none, or None if only decoding can tell."""
    try:
        head, tail, length = _read_ends(file)
        complete = looks_complete(head[:12], tail, length)
        if length > HEAD and not complete:
            # Pillow would warn that the first part of a TIFF is corrupt
            return None
        header = read_header(head)
        check_size(header, size, resize=resize, upscale=upscale)
    except (OSError, NotInstalled):
        # the decoder reports it
        return None
    except ValueError as error:
        # in a longer file, the header may end beyond the bytes that were read
        return str(error) if length <= HEAD else None
    if not complete:
        return None
    loading.tally.add(file.name, header)
    return ""


def _read_ends(file: ImageFile) -> tuple[bytes, bytes, int]:
    """The first bytes, the last bytes, and the length of a file."""
    if not isinstance(file, DiskFile):
        data = file.read()
        return data[:HEAD], data[-TAIL:], len(data)
    with open_regular(file.name, MAX_BYTES) as opened:
        head = opened.read(HEAD)
        length = opened.seek(0, 2)
        opened.seek(max(0, length - TAIL))
        return head, opened.read(TAIL), length
