#!/bin/sh
# matplotlib 3.10.0 and 3.11.2 (FreeType 2.6.1 and 2.14) draw the same font at the same size, turned by
# the same angle, as other bitmaps: data sets rendered with FT2Font depend on matplotlib's release, so
# ship the pixels. Without antialiasing and hinting by choice; the fonts are matplotlib's own.
# Seen: how many of 52 letters differ, printed at the end (more than half do).
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/draw.py" <<'P'
import sys

import matplotlib
import numpy as np
from matplotlib import ft2font

font = ft2font.FT2Font(matplotlib.get_data_path() + "/fonts/ttf/DejaVuSans.ttf")
drawn = []
for i, letter in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"):
    font.set_size(36 + i / 10, 72)
    font.set_text(letter, i % 21 - 10)
    font.draw_glyphs_to_bitmap(antialiased=False)
    ink = np.zeros((64, 64), np.uint8)
    image = font.get_image()[:64, :64]
    ink[:image.shape[0], :image.shape[1]] = image
    drawn.append(ink)
print(matplotlib.__version__, ft2font.__freetype_version__)
np.save(sys.argv[1], drawn)
P
for version in 3.10.0 3.11.2; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install -q matplotlib==$version
    "$folder/$version/bin/python" "$folder/draw.py" "$folder/$version.npy"
done
"$folder/3.11.2/bin/python" - "$folder" <<'P'
import sys

import numpy as np

old, new = (np.load(f"{sys.argv[1]}/{version}.npy") for version in ("3.10.0", "3.11.2"))
differ = (old != new).any((1, 2)).sum()
print(f"{differ} of {len(old)} letters differ")
assert differ > len(old) / 2
P
