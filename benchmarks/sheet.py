"""Generated images beside the training images that explain them best, in the order of an audit's decision: to judge it by eye.

    python benchmarks/sheet.py AUDIT DATA --out sheet.png            # AUDIT: folder of `ambient-sd audit`

Under each pair: C for a copy, - for none; D, p, and d1/d2 in pixels if it was measured.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from PIL import Image, ImageDraw

from ambient_sd.data.conditions import split_condition
from ambient_sd.data.sources import load_rows
from ambient_sd.utils.sheets import as_rgb

_SIDE, _COLUMNS = 80, 9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("audit", type=Path)
    parser.add_argument("data")
    parser.add_argument("--row_filter", nargs="+", default=[])
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=108)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    training = load_rows(args.data, row_filter=[split_condition(c) for c in args.row_filter], need_captions=False)
    lines = [json.loads(line) for line in (args.audit / "images.jsonl").read_text(encoding="utf-8").splitlines()]
    lines.sort(key=lambda line: (not line["copy"], line["p"], line["ratio"]))
    shown = lines[args.first : args.first + args.count]
    wide, high = 2 * _SIDE + 12, _SIDE + 18
    sheet = Image.new("RGB", (_COLUMNS * wide, -(-len(shown) // _COLUMNS) * high), "white")
    pen = ImageDraw.Draw(sheet)
    for i, line in enumerate(shown):
        x, y = i % _COLUMNS * wide, i // _COLUMNS * high
        pair = [Image.open(args.audit / "generated" / line["name"]), training[line["original"]["row"]].image]
        for k, image in enumerate(pair):
            sheet.paste(as_rgb(image).resize((_SIDE, _SIDE), Image.Resampling.NEAREST), (x + k * (_SIDE + 2), y))
        beside = line["nearest"].get("pixels64", {}).get("ratio")
        said = f"{'C' if line['copy'] else '-'} D{line['residual']:.2f} p{line['p']:.4f}"
        pen.text((x, y + _SIDE + 2), said + ("" if beside is None else f" {beside:.2f}"), fill="black")
    sheet.save(args.out)


if __name__ == "__main__":
    main()
