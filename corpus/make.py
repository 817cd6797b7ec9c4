"""Makes letters.npz and texts.npz, beside this file: `python corpus/make.py`.

What is drawn depends on matplotlib's release and what is written on Python's, so both are shipped:
of matplotlib 3.11.2 (its fonts DejaVu, Bitstream Vera's licence, and STIX, Open Font License) and
Python 3.11.7 (its help pages, PSF License). Other releases give other tasks.
"""
import sys
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import ft2font
from pydoc_data import topics

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import machine  # noqa: E402
from data import POOLS, SPLITS, SYMBOLS, block_means  # noqa: E402

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


def letters():
    """Each eight times in each font.

    -> {"<pool>/<split>": [letters, fonts * 8, 16, 16] uint8}.
    """
    rng, drawn = np.random.default_rng(0), {}
    for alphabet, characters in ALPHABETS.items():
        for split, names in FONTS.items():
            fonts = [
                ft2font.FT2Font(f"{matplotlib.get_data_path()}/fonts/ttf/{name}.ttf")
                for name in names.split()]
            large = [draw_letter(font, character, rng)
                     for character in characters for font in fonts for _ in range(8)]
            small = block_means(np.stack(large), 3).reshape(len(characters), -1, 16, 16)
            drawn[f"{alphabet}/{split}"] = np.uint8(small)
    return drawn


# ---------------------------------------------------------------- texts

QUOTE = 100  # characters in a row that make two pages quote each other
SHARED = 60  # no so many in a row stand in two splits


def runs(text, length):
    return [text[i:i + length] for i in range(len(text) - length + 1)]


def groups_of(pages):
    """Lists of pages; two that quote each other are in one."""
    groups = []
    for page in pages:
        mine, pieces = [page], set(runs(page, QUOTE))
        for group in [g for g in groups if g[1] & pieces]:
            groups.remove(group)
            mine, pieces = group[0] + mine, group[1] | pieces
        groups.append((mine, pieces))
    return [mine for mine, _ in groups]


def without(text, taken):
    """The text less all that lies in a run of SHARED characters that is among those taken."""
    keep = np.full(len(text), True)
    for i, run in enumerate(runs(text, SHARED)):
        if run in taken:
            keep[i:i + SHARED] = False
    left = "".join(np.array([*text])[keep])
    return left if left == text else without(left, taken)  # a cut can make another run


def texts():
    """Python's help, lower-case: by length, every third page is held out. In each pool the largest
    group of pages goes first, each where least is so far. Held-out text loses what meta-training
    has.

    -> {"<pool>/<split>": [characters] uint8, indices into SYMBOLS}.
    """
    pages = sorted(set(topics.topics.values()), key=lambda page: (len(page), page))
    pages = [page for page in pages if sum(page in other for other in pages) == 1]  # not in others
    places, taken = {}, set()
    for pool in POOLS:
        mine = [page for i, page in enumerate(pages) if (i % 3 == 0) == (pool == "held_out")]
        texts = dict.fromkeys(SPLITS, "")
        for group in sorted(groups_of([*map(spelt, mine)]), key=lambda g: -sum(map(len, g))):
            emptiest = min(texts, key=lambda split: len(texts[split]))
            texts[emptiest] += "".join(group)
        for split, text in texts.items():
            text = without(text, taken)
            taken |= set(runs(text, SHARED))
            places[f"{pool}/{split}"] = np.uint8([SYMBOLS.find(c) for c in text])
    return places


def spelt(page):
    return "".join(c if c in SYMBOLS else SYMBOLS[-1] for c in page.lower())


if __name__ == "__main__":
    machine.write_npz(HERE / "letters.npz", letters())
    machine.write_npz(HERE / "texts.npz", texts())
