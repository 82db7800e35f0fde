"""Cutting a data set in two with the classes in proportion, the same way on every machine and library version."""

import hashlib
import re
import unicodedata
from collections.abc import Sequence

from dyntune.core.errors import DataError
from dyntune.core.words import counted
from dyntune.data.base import DataSplits, ImageSubset, LabelledImages

_WORDS = dict.fromkeys(("train", "training"), "train") | {"test": "test", "testing": "test"}
_WORDS |= dict.fromkeys(("val", "valid", "validate", "validation", "dev"), "val")
MOST_CLASSES = 100_000
"""That labels may count up to where few of them occur; beyond, they are numbers of something else."""
_FILLING = frozenset(
    {"data", "dataset", "folder", "image", "images", "img", "imgs", "list", "seg", "set", "split", "video", "videos"}
)


def split_of(name: str) -> str | None:
    """Which split a folder, file or list of that name is: ``train``, ``val``, ``test``, or None for any other name.

    Capitals do not matter, nor do words that say nothing: ``Training``, ``test_set``, ``seg_train`` and ``valset`` are
    splits too.
    """
    words = _telling_words(name.lower())
    return _WORDS.get(words[0].removesuffix("set")) if len(words) == 1 and not re.search(r"\d", name) else None


def splits_among(names: Sequence[str]) -> dict[str, str]:
    """Which of the folders that lie side by side are splits, and which ones.

    Where none has a name of a split, those are whose names differ in nothing but such a word, and numbers:
    ``flowers_train`` beside ``flowers_test``, ``train2017`` beside ``val2017``, ``trainA`` beside ``testA``.
    """
    plain = {name: split for name in names if (split := split_of(name))}
    if plain:
        return plain
    alike: dict[tuple[str, ...], dict[str, str]] = {}
    for name in names:
        words = [word.lower() for word in _telling_words(re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name))]
        splits = [split for word in words if (split := _WORDS.get(word.removesuffix("set")))]
        if len(splits) == 1:
            rest = tuple(word for word in words if word.removesuffix("set") not in _WORDS)
            alike.setdefault(rest, {})[name] = splits[0]
    return {name: split for same in alike.values() if len(set(same.values())) > 1 for name, split in same.items()}


def says_nothing(name: str) -> bool:
    """Whether a folder's name tells neither a class nor a split, such as ``images``."""
    return name != "" and set(re.split(r"[\W_]+", name.lower())) <= _FILLING


def _telling_words(name: str) -> list[str]:
    return [word for word in re.split(r"[\W\d_]+", name) if word and word.lower() not in _FILLING]


def stratified_take(targets: Sequence[int], count: int, *, key: str) -> tuple[list[int], list[int]]:
    """Choose ``count`` of the labelled items at random with the classes in proportion.

    Each class gives its share of ``count`` rounded by largest remainder, but keeps at least one item. Which items are
    chosen follows from a hash of ``key`` and their positions, so no random generator's version matters.

    Returns:
        (chosen, rest): two sorted lists of positions that together are all of them. Fewer than ``count`` are chosen
        only where the classes are too small to give so many.
    """
    members: dict[int, list[int]] = {}
    for position, target in enumerate(targets):
        members.setdefault(target, []).append(position)
    shares = {label: count * len(found) / len(targets) for label, found in members.items()}
    room = {label: len(found) - 1 for label, found in members.items()}
    given = {label: min(int(shares[label]), room[label]) for label in members}
    # One more to the class that is furthest below its share, until the count is reached or no class has room.
    while sum(given.values()) < min(count, sum(room.values())):
        open_labels = [label for label in members if given[label] < room[label]]
        open_labels.sort(key=lambda label: (given[label] - shares[label], label))
        for label in open_labels[: min(count, sum(room.values())) - sum(given.values())]:
            given[label] += 1

    def order(position: int) -> bytes:
        return hashlib.blake2b(f"{key}/{position}".encode(), digest_size=16).digest()

    chosen = {position for label in members for position in sorted(members[label], key=order)[: given[label]]}
    return sorted(chosen), [position for position in range(len(targets)) if position not in chosen]


def take_by_place(
    places: Sequence[str], targets: Sequence[int], share: float, *, key: str
) -> tuple[list[int], list[int]]:
    """Choose about ``share`` of the items by where each lies, so that items which come or go later move no other.

    An item is chosen where the hash of ``key`` and its place is below ``share``. Only where that would be a whole
    class, its item with the highest hash stays; and where it would be none at all, that with the lowest is chosen, if
    its class has another.

    Returns:
        (chosen, rest): two sorted lists of positions that together are all of them.
    """

    def height(position: int) -> float:
        # Systems differ in how they write accents, and in nothing else.
        place = unicodedata.normalize("NFC", places[position]).encode("utf-8", "surrogatepass")
        return int.from_bytes(hashlib.blake2b(f"{key}/".encode() + place, digest_size=8).digest()) / 2**64

    members: dict[int, list[tuple[float, int]]] = {}
    for position, target in enumerate(targets):
        members.setdefault(target, []).append((height(position), position))
    chosen: list[int] = []
    for found in members.values():
        found.sort()
        count = sum(its_height < share for its_height, _ in found)
        chosen += [position for _, position in found[: min(count, len(found) - 1)]]
    if not chosen:
        chosen = [position for _, position in sorted(found[0] for found in members.values() if len(found) > 1)[:1]]
    return sorted(chosen), sorted(set(range(len(targets))) - set(chosen))


def split_off(data: LabelledImages, fraction: float, *, key: str) -> tuple[LabelledImages, LabelledImages]:
    """Split ``fraction`` of a data set off: (what is left, what was split off).

    Images of folders are split by their paths, and those of shards and of the Hugging Face hub by their content, so
    that images that are added later do not move the others; those of other data sets by their positions, with the
    classes in proportion.

    Raises:
        DataError: no class has two images, so that nothing can be split off.
    """
    places = [place for index in range(len(data)) if (place := data.place(index)) is not None]
    if len(places) == len(data):
        chosen, rest = take_by_place(places, data.targets, fraction, key=key)
    else:
        chosen, rest = stratified_take(data.targets, max(1, round(len(data) * fraction)), key=key)
    if not chosen:
        raise DataError(
            f"cannot split {fraction:.0%} off {counted(len(data), data.noun)}: every class must keep one and none has "
            f"two. Add {data.noun}s, or give those to validate and to test on as splits of their own."
        )
    left, split = ImageSubset(data, rest), ImageSubset(data, chosen)
    split.skipped = ()  # of no split in particular, they are counted once, with what is left
    return left, split


def assemble(
    name: str,
    train: LabelledImages,
    val: LabelledImages | None,
    test: LabelledImages | None,
    classes: Sequence[str],
    *,
    seed: int,
    val_fraction: float,
) -> DataSplits:
    """Splits made complete: validation images split off the training images where there are none of their own.

    Args:
        classes: class names in label order; further labels that occur are named by their number.

    Raises:
        DataError: a label is negative, or no number of a class, or a split has no images.
    """
    names = list(classes)
    labels = {label for split in (train, val, test) if split is not None for label in split.targets}
    highest = max(labels, default=0)
    if highest >= len(names) and highest >= max(MOST_CLASSES, 10 * len(labels)):
        raise DataError(
            f"{name}: the highest label is {highest}, of {counted(len(labels), 'label')} that differ. Expected "
            "zero-based numbers of classes; number them anew."
        )
    for split_name, split in (("train", train), ("validation", val), ("test", test)):
        if split is None:
            continue
        if not len(split):
            raise DataError(
                f"{name}: the {split_name} split has no {split.noun}s. Expected at least one; add {split.noun}s to it."
            )
        if min(split.targets) < 0:
            raise DataError(
                f"{name}: the {split_name} split has the label {min(split.targets)}. Expected zero-based labels; "
                f"leave {split.noun}s without a label out."
            )
        names += [str(label) for label in range(len(names), max(split.targets) + 1)]
    if val is None:
        train, val = split_off(train, val_fraction, key=f"val/{seed}")
    return DataSplits(name, train, val, test, tuple(names))
