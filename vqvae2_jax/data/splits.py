"""Splits a set of images at random, in a reproducible way."""

import numpy as np

SPLITS = ('train', 'validation', 'test')


def random_split(
    count: int,
    held_out: tuple[float, float],
    seed: int,
    stratify_by: np.ndarray | None = None,
    labels: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Splits range(count) at random. Every prefix of a split is a random sample too, without what `labels` moved.

    Args:
      count: number of images.
      held_out: shares for (validation, test); a share above 0 gets at least one example of each stratum, unless it
        is the only one of its class.
      seed: seed of the random order.
      stratify_by: int [count]; the images of each value are split in the same shares. None: all together.
      labels: int [count]; if a class has no training image, one of another split becomes the last training image.
        None: there are no classes.

    Returns:
      {'train', 'validation', 'test'}: int64 indices, disjoint.
    """
    # RandomState, as NumPy promises that its stream will never change: neither will a split.
    generator = np.random.RandomState(seed)
    order = generator.permutation(count)
    groups = (
        [order] if stratify_by is None else [order[stratify_by[order] == value] for value in np.unique(stratify_by)]
    )
    splits = {split: [] for split in SPLITS}
    for group in groups:
        sizes = [max(1, round(share * len(group))) if share else 0 for share in held_out]
        validation, test, train = np.split(group, np.cumsum(sizes))
        for split, part in zip(SPLITS, (train, validation, test), strict=True):
            splits[split].append(part)
    splits = {split: generator.permutation(np.concatenate(parts)) for split, parts in splits.items()}
    return splits if labels is None else _with_all_classes_in_train(splits, labels)


def _with_all_classes_in_train(splits, labels):
    """Moves one image of every class that has none in 'train' there, from 'validation' or else from 'test'."""
    for label in np.setdiff1d(labels, labels[splits['train']]):
        origin = 'validation' if label in labels[splits['validation']] else 'test'
        position = np.flatnonzero(labels[splits[origin]] == label)[-1]
        splits['train'] = np.append(splits['train'], splits[origin][position])
        splits[origin] = np.delete(splits[origin], position)
    return splits
