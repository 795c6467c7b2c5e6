"""Named clip art from Debian's `openclipart-svg` 0.18 (public domain, 8,121 SVGs): what is taken of it and under which name.

Taken are things that one can name: animals, food, plants, buildings, tools, vehicles and their like. Left out: icon themes, buttons,
stars, gradients, patterns, flags, maps, road and safety signs, playing cards, lettering, portraits, nudity, weapons, tobacco and
drugs, logos and mascots, religious and political emblems, and whatever has no English name. Looked through on contact sheets.

One artist's work is never seen by the base: `CONFIRM`, 489 drawings in one hand (food, music, sports, animals, most of them with an
outline version), for confirming on another kind of image what was found on emoji.
"""

from __future__ import annotations

import gzip
import html
import re
import subprocess
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "openclipart-svg=1:0.18+dfsg-19"
CONFIRM = "Gerald G."  # chosen before any result: the largest body of titled work that is neither icons nor shapes
_FOLDERS = re.compile(
    r"animals/|food/|plants/|buildings/|containers/|education/|electronics/|office/|science/|tools/(?!weapons)|decorations/|"
    r"people/(bodypart|clothing/(?!pantyhose))|computer/hardware/|signs_and_symbols/weather/|recreation/(?!games/cards|religion)|"
    r"transportation/(?!aiga-symbols|roadsigns)"
)
_CONFIRM_FOLDERS = re.compile(_FOLDERS.pattern + r"|people/")
# By name or tag: brands and mascots, weapons, emblems, tobacco and drugs, nudity, portraits, writing, and scenes of many things.
_UNWANTED = re.compile(
    r"tux|linux|gnu|xbox|game_?boy|nikon|coolpix|ipod|rhythmbox|sony|sprint|hummer|bmw|chevrolet|skoda|blazer|dodge|emule|garmin|otto|"
    r"openoffice|mozilla|alcatel|cisco|microsoft|windows|coca|pepsi|lego|rubik|domo|pac-?man|chomper|tetris|pong|bofh|"
    r"weapon|grenade|kallisti|gun\b|rifle|pistol|bomb|tank|military|army|abrams|soldier|ammo|sword|nunchaku|shuriken|shi_?ken|katana|"
    r"sunwheel|swastika|elder_sign|lauburu|illuminati|triskel|celtic|discord|eris|fsm|cannabis|marijuana|cigar|smok|tobacco|pipe|"
    r"alcohol|nude|naked|sexy|strip|pantyhose|lingerie|martin|einstein|bach|beethoven|handel|portrait|jazz|van_gogh|"
    r"flag|tatoo|tattoo|flourish|banner|border|corner|pattern|texture|gradient|collage|menu_example|certificate|chess|kanji|"
    r"_mate|skoynk|squeek|shaezy|mhooo|creation_day|dead_f|stripe|"
    r"diagram|connector|navigati|pfd|arrow|cross_ha|cursor|pointer|finestra|part_of|logo|virus|hash|wing_mit|numero|"
    r"piano_theory|bass_clef|capsize|knot|hacker|pimp|human_humain|evolution|firewall|doublesight|8_?port|24_port|gis_comp|three_eyes|"
    r"perspectival|inservice|roadsign|aiga|motorway|_sign|symbols|route|car_[01]_sy|asana|sport_|airbrush|decoration|crossed_out"
)
_NOISE = re.compile(
    r"\b(clip ?art|r\d+ si[bm]+ission|by|the|an?|of|b and w|bw|simple|generic|icon|symbol|illustration|stylized|none|svg|one|two|az|"
    r"rollandin|mate|modern|d|sauvetage|revisited|drawn with straight lines|inkpen style)\b"
)
# Tags that name a shelf, not a thing.
_SHELF = """
food tool container bodypart office animal plant sport recreation holiday music clothing toy weather building transport vehicle
party education people science art game hardware computer sign shape face nature fall winter spring summer hot cold news study
traffic farm saint fruit vegetable beverage dessert drink meat home black white red blue green yellow
symbol health big garden studio silhouette place engine cooking
"""
SHELVES = frozenset(_SHELF.split())


@dataclass(frozen=True)
class Drawing:
    """One SVG: its text, where it lay in the package, who made it, what it, its file (`stem`) and its tags say it shows."""

    path: str
    svg: str
    artist: str
    name: str
    stem: str
    tags: tuple[str, ...]


def unpack(folder: Path) -> Path:
    """Download the package with apt and unpack it into `folder`, unless it is there; return where its drawings lie."""
    root = folder / "usr/share/openclipart/svg"
    if not root.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", PACKAGE], check=True, cwd=folder)
        subprocess.run(["dpkg", "-x", str(next(folder.glob("*.deb"))), str(folder)], check=True)
    return root


def _metadata(svg: str) -> tuple[str, str, tuple[str, ...]]:
    block = (re.findall(r"<metadata.*?</metadata>", svg, re.S) or [""])[0]
    title = (re.findall(r"<dc:title[^>]*>(.*?)</dc:title>", block, re.S) or [""])[0]
    artist = (re.findall(r"<dc:creator.*?<dc:title[^>]*>(.*?)</dc:title>", block, re.S) or [""])[0]
    tags = [t.strip().lower() for t in re.findall(r"<rdf:li[^>]*>(.*?)</rdf:li>", block, re.S)]
    return (
        html.unescape(title).strip(),
        html.unescape(artist).strip(),
        tuple(t for t in tags if t and not t.startswith(("hash", "0x"))),
    )


def _plain(text: str) -> str:
    text = re.sub(r"\([^)]*\)|[#@].*|\d+", " ", text.lower().replace("_", " ").replace("-", " "))
    return " ".join(re.sub(r"[^a-z' ]", " ", _NOISE.sub(" ", text)).split())


def _stem(path: str, artist: str) -> str:
    """The file's name without numbers and without its artist, whose words come last and may be cut short."""
    parts = [p for p in re.split(r"[_.\s-]+", Path(path).stem.lower()) if p and not p.isdigit()]
    whose = [p for p in re.split(r"[^a-z]+", artist.lower()) if p] + ["ganson"]
    while len(parts) > 1 and any(w.startswith(parts[-1]) for w in whose):
        parts.pop()
    return _plain(re.sub(r"\d+", "", " ".join(p for p in parts if len(p) > 1)))


def drawings(root: Path, english: Collection[str]) -> tuple[list[Drawing], list[Drawing]]:
    """List the named clip art: for the base, and for confirming (one artist's). `english`: words that are known to be English."""
    read = {}
    for file in sorted(root.rglob("*.svg*")):
        data = file.read_bytes()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf8", "replace")
        read[str(file.relative_to(root))] = (text, *_metadata(text))
    titles = Counter(title for _, title, _, _ in read.values())
    tagged = Counter(w for _, _, _, tags in read.values() for t in set(tags) for w in _plain(t).split() if len(w) > 2)
    # Many file names are Italian or French; the tags are English.
    dictionary = {w for w, n in tagged.items() if n >= 2} | {w for w in english if len(w) > 2}
    base, confirm = [], []
    for path, (svg, title, artist, tags) in read.items():
        ours = artist == CONFIRM
        if not (_CONFIRM_FOLDERS if ours else _FOLDERS).match(path):
            continue
        if _UNWANTED.search(" ".join([path, title.lower().replace(" ", "_"), *tags])):
            continue
        stem, plain = _stem(path, artist), _plain(title)
        # A title that many files share names the collection, not the thing; then the file's name does.
        name = plain if plain and titles[title] <= 2 and set(plain.split()) & set(stem.split()) else stem
        if not dictionary & set(name.split()):
            telling = [t for t in tags if t in english and t.rstrip("s") not in SHELVES]
            name = min(telling, key=lambda t: (tagged[t], t), default="")
        if 2 < len(name) <= 40 and name.rstrip("s") not in SHELVES:
            (confirm if ours else base).append(Drawing(path, svg, artist, name, stem, tags))
    return base, confirm
