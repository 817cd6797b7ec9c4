"""What is learned from, offline: letters in matplotlib's fonts, CPython's help, your own arrays."""
import functools

import matplotlib
import numpy as np
from matplotlib import ft2font
from pydoc_data import topics

import machine

SPLITS = ("train", "inner_valid", "outer_valid", "test")

# ---------------------------------------------------------------- letters

# Classes are split by alphabet: meta-training never sees a held-out letter (Cyrillic letters that
# look Latin are left out). Examples are split by font: no split sees the fonts of another, and each
# mixes sans and serif, upright and slanted.
ALPHABETS = {
    "meta_train": "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
                  "ΓΔΘΛΞΠΣΦΨΩαβγδεζηθικλμνξπρστυφχψω",
    "held_out": "БГДЖЗИЙЛПУФЦЧШЩЪЫЬЭЮЯбвгджзийклмнптфцчшщъыьэюя"}
FONTS = {
    "train": "DejaVuSans DejaVuSans-Bold DejaVuSans-Oblique DejaVuSansMono "
             "DejaVuSansMono-BoldOblique DejaVuSerif STIXGeneralBolIta",
    "inner_valid": "DejaVuSansMono-Bold DejaVuSerif-BoldItalic STIXGeneralBol",
    "outer_valid": "DejaVuSans-BoldOblique DejaVuSerif-Italic STIXGeneral",
    "test": "DejaVuSansMono-Oblique DejaVuSerif-Bold STIXGeneralItalic"}
SIDE = 48  # letters are drawn three times too large, then averaged down to 16 x 16


def draw_letter(font, letter, rng):
    """Turned by up to 15 degrees, scaled by up to 15% and shifted by up to 5 pixels.

    -> [SIDE, SIDE] uint8.
    """
    font.set_size(rng.uniform(0.75, 1.0) * SIDE, 72)
    font.set_text(letter, rng.uniform(-15, 15))
    font.draw_glyphs_to_bitmap(antialiased=False)
    ink = font.get_image()[:SIDE, :SIDE]
    height, width = ink.shape
    room = np.subtract(SIDE, ink.shape)
    top, left = np.clip(room // 2 + rng.integers(-5, 6, 2), 0, room)
    canvas = np.zeros((SIDE, SIDE), np.uint8)
    canvas[top:, left:][:height, :width] = ink
    return canvas


def block_means(images, n):
    """Over n x n pixels: [..., H, W] uint8 -> [..., H / n, W / n]. Much faster than numpy's own."""
    return sum(
        images[..., i::n, j::n].astype(np.uint16)
        for i, j in np.ndindex(n, n)) / n ** 2


def draw_letters():
    """Each eight times in each font: takes seconds.

    -> {"<alphabet>/<split>": [letters, fonts * 8, 16, 16] uint8}.
    """
    rng, drawn = np.random.default_rng(0), {}
    for alphabet, letters in ALPHABETS.items():
        for split, names in FONTS.items():
            fonts = [
                ft2font.FT2Font(f"{matplotlib.get_data_path()}/fonts/ttf/{name}.ttf")
                for name in names.split()]
            large = [draw_letter(font, letter, rng)
                     for letter in letters for font in fonts for _ in range(8)]
            small = block_means(np.stack(large), 3).reshape(len(letters), -1, 16, 16)
            drawn[f"{alphabet}/{split}"] = np.uint8(small)
    return drawn


@functools.cache
def letters():
    """What `draw_letters` drew, once on each machine."""
    return machine.kept("letters_1", draw_letters)


def small_letters(pool):
    """-> {split: [letters, examples, 64] float32}: 2x2 means, ink 1 and paper 0, less their mean.

    Training images come in nine positions, moved by up to a pixel. The mean is that of all of them:
    inputs that are never negative were seen to kill ReLU units.
    """
    images = {}
    for split in SPLITS:
        shifts = (-1, 0, 1) if split == "train" else (0,)
        drawn = letters()[f"{pool}/{split}"]
        moved = [np.roll(drawn, (i, j), (2, 3)) for i in shifts for j in shifts]
        means = block_means(np.concatenate(moved, 1), 2) / 255
        images[split] = np.float32(means).reshape(len(drawn), -1, 64)
    center = images["train"].mean((0, 1))
    return {split: x - center for split, x in images.items()}


# ---------------------------------------------------------------- texts

# All other characters count as the last.
SYMBOLS = "\n abcdefghijklmnopqrstuvwxyz0123456789.,:;'\"()[]{}<>=+-*/_|!#@`"


@functools.cache
def texts(pool):
    """-> {split: [characters] int, indices into SYMBOLS}; a page is in one pool and one split."""
    pages = sorted(set(topics.topics.values()), key=len)
    pages = [page for page in pages if sum(page in other for other in pages) == 1]  # not in others
    mine = [page for i, page in enumerate(pages) if (i % 3 == 0) == (pool == "held_out")]
    coded = {}
    for i, split in enumerate(SPLITS):
        text = "".join(mine[i::4]).lower()
        coded[split] = np.array([SYMBOLS.find(c) for c in text]) % len(SYMBOLS)
    return coded


# ---------------------------------------------------------------- your own arrays

def require(fine, sentence):
    if not fine:
        raise ValueError(sentence)


def checked(arrays):
    """-> x_train, y_train, x_test, y_test, number of classes (0: targets)."""
    names = "x_train", "y_train", "x_test", "y_test"
    require(set(names) <= set(arrays), f"The data must hold arrays named {', '.join(names)}.")
    for name in names:
        a = arrays[name]
        require(a.dtype.kind in "buif" and np.isfinite(a).all(),
                f"{name} must hold finite numbers, without text, NaN or infinity.")
    x, y, x_test, y_test = (arrays[name] for name in names)
    require(x.ndim in (2, 3, 4) and x.size and x.shape[1:] == x_test.shape[1:],
            f"x_train and x_test have shapes {x.shape} and {x_test.shape}: both must be rows "
            "[n, F] or images [n, H, W] or [n, H, W, C], all of one size.")
    require(len(x) >= 20 and len(x_test), "x_train must have at least 20 rows, and x_test one.")
    for inputs, outputs in (x, y), (x_test, y_test):
        n = len(inputs)
        require(outputs.shape in ((n,), (n, 1)), f"y has shape {outputs.shape}, but must hold one "
                f"label or target for each of the {n} rows of x.")
    floats = y.dtype.kind == "f"
    require(floats == (y_test.dtype.kind == "f"),
            "y_train and y_test must both be labels (integers), or both float targets.")
    classes = 0 if floats else int(y.max()) + 1
    require(floats or y.min() == 0 <= y_test.min() and 1 < classes > y_test.max(),
            "Labels must run from 0 to the number of classes less one, in training and test.")
    return x, y, x_test, y_test, classes


def standardiser(seen):
    """-> f(values): their distance from the mean of those seen, in standard deviations."""
    seen = np.float64(seen)  # some numbers don't fit into float32
    center = seen.mean(0, keepdims=True)
    spread = seen.std(0 if seen.ndim < 3 else None, keepdims=True) + 1e-6  # images: of all pixels
    return lambda values: (values - center) / spread


def own(arrays):
    """Your arrays (as in Keras's mnist.npz) -> {split: (x, y)}, scale, number of classes.

    x_train and x_test hold rows of features [n, F] or images [n, H, W] or [n, H, W, C], as any
    numbers; scale(x) standardises a batch of them. y_train and y_test hold labels, integers from 0,
    or float targets (no classes), which are standardised already. A fifth of the training rows
    serves inner_valid and outer_valid. ValueError, with one sentence, for anything else.
    """
    x, y, x_test, y_test, classes = checked(arrays)
    n = len(x)
    tenth = n // 10
    rng = np.random.default_rng(0)
    inner, outer, train = np.split(rng.permutation(n), [tenth, 2 * tenth])
    scale = standardiser(x[train])
    inputs = np.concatenate([x, x_test])
    if inputs.dtype != np.uint8:  # bytes stay bytes: a quarter of the memory
        inputs, scale = np.float32(scale(inputs)), lambda x: x
    outputs = np.concatenate([y, y_test], axis=None)
    outputs = np.int32(outputs) if classes else np.float32(standardiser(outputs[train])(outputs))
    rows = zip(SPLITS, (train, inner, outer, range(n, len(inputs))))
    return {split: (inputs[i], outputs[i]) for split, i in rows}, scale, classes
