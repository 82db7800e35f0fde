"""Cutting a data set in two with the classes in proportion, the same way on every machine and library version."""

import hashlib
from collections.abc import Sequence

from dyntune.core.errors import DataError
from dyntune.data.base import DataSplits, ImageSubset, LabelledImages


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


def split_off(data: LabelledImages, fraction: float, *, key: str) -> tuple[LabelledImages, LabelledImages]:
    """Split ``fraction`` of a data set off, stratified: (what is left, what was split off).

    Raises:
        DataError: no class has two images, so that nothing can be split off.
    """
    chosen, rest = stratified_take(data.targets, max(1, round(len(data) * fraction)), key=key)
    if not chosen:
        raise DataError(
            f"cannot split {fraction:.0%} off {len(data)} images: every class must keep one image and none has two. "
            "Add images, or give the validation and test images as splits of their own."
        )
    return ImageSubset(data, rest), ImageSubset(data, chosen)


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
        DataError: a label is negative, or a split has no images.
    """
    names = list(classes)
    for split_name, split in (("train", train), ("validation", val), ("test", test)):
        if split is None:
            continue
        if not len(split):
            raise DataError(f"{name}: the {split_name} split has no images. Expected at least one; add images to it.")
        if min(split.targets) < 0:
            raise DataError(
                f"{name}: the {split_name} split has the label {min(split.targets)}. Expected zero-based labels; "
                "leave images without a label out."
            )
        names += [str(label) for label in range(len(names), max(split.targets) + 1)]
    if val is None:
        train, val = split_off(train, val_fraction, key=f"val/{seed}")
    return DataSplits(name, train, val, test, tuple(names))
