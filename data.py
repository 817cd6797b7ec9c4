"""What is learned from, offline: letters and texts."""
import functools
from pathlib import Path

import numpy as np

import machine

POOLS = ("meta_train", "held_out")  # nothing that is held out is ever meta-trained on
SPLITS = ("train", "inner_valid", "outer_valid", "test")
CORPUS = Path(__file__).with_name("corpus")  # its make.py says how both were made and divided

# ---------------------------------------------------------------- letters

def block_means(images, n):
    """Over n x n pixels: [..., H, W] uint8 -> [..., H / n, W / n]. Much faster than numpy's own."""
    return sum(
        images[..., i::n, j::n].astype(np.uint16)
        for i, j in np.ndindex(n, n)) / n ** 2


@functools.cache
def letters():
    """-> {"<pool>/<split>": [letters, examples, 16, 16] uint8}.

    The pools have other letters (Latin and Greek; Cyrillic), the splits other fonts.
    """
    return machine.read_npz(CORPUS / "letters.npz")


def small_letters(pool):
    """-> {split: [letters, examples, 64] float32}: 2x2 means, ink 1 and paper 0, less their mean.

    Training images come in nine positions, moved by up to a pixel. The mean is that of all of them:
    inputs that are never negative were seen to kill ReLU units.
    """
    images = {}
    for split in SPLITS:
        shifts = (-1, 0, 1) if split == "train" else (0,)
        drawn = letters()[f"{pool}/{split}"]
        moved = [
            np.roll(drawn, (i, j), (2, 3))
            for i in shifts for j in shifts]
        means = block_means(np.concatenate(moved, 1), 2) / 255
        images[split] = np.float32(means).reshape(len(drawn), -1, 64)
    center = images["train"].mean((0, 1))
    return {split: x - center for split, x in images.items()}


# ---------------------------------------------------------------- texts

# All other characters count as the last.
SYMBOLS = "\n abcdefghijklmnopqrstuvwxyz0123456789.,:;'\"()[]{}<>=+-*/_|!#@`"


@functools.cache
def texts(pool):
    """Python's help -> {split: [characters] uint8, indices into SYMBOLS}. No two splits, of any
    pool, share 60 characters in a row."""
    coded = machine.read_npz(CORPUS / "texts.npz")
    return {split: coded[f"{pool}/{split}"] for split in SPLITS}
