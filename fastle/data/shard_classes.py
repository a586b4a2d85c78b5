"""The classes of images in shards: labels of WebDataset or folders in a tar or a zip, a column of a parquet file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fastle.errors import DataError

from .loading import Loading
from .parquet import read_labels
from .shard_index import common_folder, shard_prefixes, split_of
from .shard_members import key_of, member_classes
from .shards import SPLIT_CODES, ShardIndex

NO_TAG = "no .cls beside it names its class, and because of {} its folder does not: give every image a .cls, or none"
NO_FOLDER = (
    "neither a .cls beside it nor a folder tells its class from that of others: add it, or pack a folder for each class"
)
SPLITS = {SPLIT_CODES[name]: name for name in ("train", "test")}


def shard_classes(
    index: ShardIndex, root: Path, loading: Loading
) -> tuple[dict[str, dict[str, list[int]]], Callable[[int], str]]:
    """The images of shards by split and class.

    Where a tar or a zip holds entries KEY.cls, as WebDataset has them, these are the classes of the images KEY.jpg.
    Otherwise the first folder of a member is its class, as if the shards were unpacked: below the folders that all
    members lie in, and below train/ and test/, if members lie in both. If they do not, the shards may name these
    splits. Images of other splits are left out.

    Args:
        index: Of the shards.
        root: What the user gave, see `open_shards`.
        loading: Shows the progress.

    Returns:
        Rows of the index by class, of "train" and "test", or of "all" if nothing names these splits; and the function
        from a row to its path below `root`, as the folder that was packed has it.

    Raises:
        DataError: An image has no class.
    """
    labels = {i: iter(read_labels(path)) for i, path in enumerate(index.shards) if path.lower().endswith(".parquet")}
    shards = index.shard.tolist()
    members = [index.member(row) for row in range(len(shards))]
    packed = [member for member, shard in zip(members, shards, strict=True) if shard not in labels]
    start = common_folder(min(packed), max(packed)) if packed else 0
    prefixes = shard_prefixes(index.shards, root)
    paths = [
        f"{prefixes[shard]}{member}" if shard in labels else member[start:]
        for member, shard in zip(members, shards, strict=True)
    ]
    by_member = [split_of(path) for path in paths]
    by_shard = [(split_of(f"{prefixes[shard]}image")[0], path) for path, shard in zip(paths, shards, strict=True)]
    named = (places for places in (by_member, by_shard) if SPLITS.keys() <= {code for code, _ in places})
    places, splits = next(((places, SPLITS) for places in named), ([(0, path) for path in paths], {0: "all"}))
    archives = [i for i in range(len(index.shards)) if i not in labels]
    tags = {i: member_classes(index.shards[i]) for i in loading.track(archives, "looking for .cls", len(archives))}
    tagged = next((f"{index.shards[i]}, {key}.cls" for i, keys in tags.items() for key in keys), "")
    classes: dict[str, dict[str, list[int]]] = {split: {} for split in splits.values()}
    for row, (code, path) in enumerate(places):
        shard = shards[row]
        if shard in labels:
            name = next(labels[shard])
        elif tagged:
            name = tags[shard].get(key_of(members[row]), "")
        else:
            name = path.partition("/")[0] if "/" in path else ""
        if code not in splits:
            continue
        if not name:
            raise DataError(f"{index.name(row)}: {NO_TAG.format(tagged) if tagged else NO_FOLDER}")
        classes[splits[code]].setdefault(name, []).append(row)
    return classes, paths.__getitem__
