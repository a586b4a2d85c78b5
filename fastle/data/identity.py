"""The identity of a split: a fingerprint of its images' names and sizes, by which a resumed run recognises them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fastle.errors import DataError

from .decode import ImageFile


@dataclass(frozen=True, slots=True)
class Identity:
    """What a run knows of the images it is trained on.

    Attributes:
        count: The number of images that can be used.
        names: A digest of the names of all images, in their order, relative to the folder that holds them all. For
            images that are not files, the name of the dataset.
        sizes: A digest of the sizes of the files; "" for images that are not files.
    """

    count: int
    names: str
    sizes: str = ""

    def to_dict(self) -> dict[str, Any]:
        """A JSON object, as a checkpoint holds it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> Identity:
        """The inverse of `to_dict`.

        Raises:
            DataError: It is no such object.
        """
        kinds = {"count": int, "names": str, "sizes": str}
        if not isinstance(values, dict) or {name: type(value) for name, value in values.items()} != kinds:
            raise DataError(f"the identity of the training images must hold {', '.join(kinds)}, not {str(values)[:80]}")
        return cls(**values)

    def difference(self, before: Identity) -> str | None:
        """How these images differ from those of an earlier time, as the end of "the images …"; None if they do not."""
        if self.count != before.count:
            return f"were {before.count} when the run was saved and are {self.count} now"
        if self.names != before.names:
            return f"are as many as before, {self.count}, but their names have changed"
        if self.sizes != before.sizes:
            return "have the same names as before, but the sizes of the files have changed"
        return None


def identify(files: Sequence[ImageFile]) -> Identity:
    """The identity of image files. It looks at their names and sizes and reads none."""
    names, sizes = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)
    # a folder keeps its identity when it is moved, and however --data names it
    above = _folder_of_all([file.name for file in files])
    for file in files:
        names.update(file.name[above:].encode("utf-8", "surrogateescape") + b"\0")
        try:
            sizes.update(file.stamp().split()[0].encode() + b"\0")
        except OSError:
            sizes.update(b"missing\0")
    return Identity(len(files), names.hexdigest(), sizes.hexdigest())


def _folder_of_all(names: Sequence[str]) -> int:
    """The length of the path, with its last separator, that all names begin with."""
    if not names:
        return 0
    first, last = min(names), max(names)
    # what the first and the last have in common, all between them share
    common = os.path.commonprefix([first, last])  # noqa: RUF071
    return common.rfind(os.sep) + 1
