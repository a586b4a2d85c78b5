"""Bad files are found before the training begins: by header and end, and by decoding where those leave a doubt."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .decode import BadFiles, Decoder, DiskFile, ImageFile, check_size, default_threads
from .header import looks_whole, read_header
from .loading import Loading

HEAD, TAIL = 65_536, 64  # bytes that are looked at
TOGETHER = 256  # files


def find_faults(files: Sequence[ImageFile], decoder: Decoder, loading: Loading, *, size: int) -> dict[int, str]:
    """What is wrong with which files, by position: all that can be told without decoding every one of them.

    Args:
        files: of a split.
        decoder: for those in doubt.
        loading: for the progress bar.
        size: that will be cut out, pixels.
    """
    faults: dict[int, str] = {}
    doubtful: list[int] = []
    with ThreadPoolExecutor(default_threads(), thread_name_prefix="check") as pool:
        starts = range(0, len(files), TOGETHER)
        for start in loading.track(starts, "checking the images", len(starts)):
            found = pool.map(lambda file: _look(file, size), files[start : start + TOGETHER])
            for position, fault in enumerate(found, start):
                if fault is None:
                    doubtful.append(position)
                elif fault:
                    faults[position] = f"{files[position].name} {fault}"
    for start in range(0, len(doubtful), TOGETHER):
        positions = doubtful[start : start + TOGETHER]
        try:
            decoder([files[position] for position in positions])
        except BadFiles as bad:
            faults |= {positions[within]: fault for within, fault in bad.faults.items()}
    return faults


def _look(file: ImageFile, size: int) -> str | None:
    """The fault of a file, "" for none, None if only decoding can tell."""
    try:
        head, tail, length = _ends(file)
        header = read_header(head)
        check_size(header, size)
    except OSError:
        # the decoder finds the words
        return None
    except ValueError as error:
        # the header may end behind what was read
        return str(error) if length <= HEAD else None
    return "" if looks_whole(head[:12], tail, length) else None


def _ends(file: ImageFile) -> tuple[bytes, bytes, int]:
    """The first bytes, the last bytes, and how many there are."""
    if not isinstance(file, DiskFile):
        data = file.read()
        return data[:HEAD], data[-TAIL:], len(data)
    with Path(file.name).open("rb") as opened:
        head = opened.read(HEAD)
        length = opened.seek(0, 2)
        opened.seek(max(0, length - TAIL))
        return head, opened.read(TAIL), length
