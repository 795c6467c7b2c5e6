"""Which names mean the same thing, across packages: what keeps the concepts of two splits apart.

An image is known here by its names: Unicode's, the one that icon packages use (CLDR's), and the other names that people use
(`names.ALIASES`). `words` reduces a name to the words that tell things apart: skin tones, gender, colour, direction, "face", "cat
face" and their like go. Names are variants of one another when the words of one contain the words of the other, so that "crying
face", "loudly crying face" and "crying cat face" are one family, as are all hearts, and "automobile" and "oncoming automobile".
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

# Words by which variants of one thing differ, and words that say nothing.
_SAME = """
a an the and or of on in at with without to for from by into over under behind up down left right leftwards rightwards upwards
downwards forward backward facing back front side oncoming open closed double single one two three large medium small big little
tiny heavy light dark bold simple new old generic basic stylized cartoon symbol sign ornament button emoji icon badge face head cat
man woman men women person people boy girl male female adult older child skin tone red orange yellow green blue purple pink brown
black white grey gray colour color silver gold golden
"""
# Words for one thing; the first of each line stands for all.
_ONE_WORD = """
car automobile auto racecar
doughnut donut
television tv
airplane aeroplane plane aircraft
bicycle bike cyclist bicyclist biking cycling
donkey burro mule
rabbit bunny hare
ladybug ladybird
honeybee bee bumblebee
pig piglet boar hog
chicken rooster hen chick
sheep ewe lamb
present gift
police cop policeman policewoman
telephone phone
cry crying sob
laptop notebook
ship boat
racket racquet
glass eyeglasses spectacles
magnifier magnifying loupe
flashlight torch
watch wristwatch
backpack rucksack satchel knapsack
pot saucepan
pan skillet
mouse mice
"""


def _stem(word: str) -> str:
    """Cut a plural's ending, so that "cherries" and "cherry" are one word."""
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and re.search(r"(ch|sh|x|ss|[tg]o)es$", word):
        return word[:-2]
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")) else word


_SAME_WORDS = frozenset(_SAME.split())
_FIRST_WORD = {_stem(w): _stem(line.split()[0]) for line in _ONE_WORD.strip().split("\n") for w in line.split()}


def words(name: str) -> frozenset[str]:
    """Return the words of `name` that tell things apart; all of its words where none does."""
    text = name.lower().replace("'s", "").replace("lady beetle", "ladybug").replace("jack-o-lantern", "pumpkin")
    plain = [_stem(w) for w in re.findall(r"[a-z]+", text)]
    plain = [_FIRST_WORD.get(w, w) for w in plain]
    return frozenset(w for w in plain if w not in _SAME_WORDS and len(w) > 1) or frozenset(plain)


def families(names: Sequence[Iterable[str]]) -> list[int]:
    """Number the families: two concepts are in one where the words of a name of one contain those of a name of the other.

    A concept is given by all its names. A name joins only those with at most one word more: "sun" and "sun with face" are one
    family, and a chain of such steps is too, but "heart" does not draw in every long name that mentions one.
    """
    parent = list(range(len(names)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    by_words: dict[frozenset[str], list[int]] = defaultdict(list)
    for i, several in enumerate(names):
        for name in several:
            by_words[words(name)].append(i)
    for several_words, members in by_words.items():
        for smaller in (several_words, *(several_words - {w} for w in several_words)):
            for j in by_words.get(smaller, ()):
                parent[root(members[0])] = root(j)
            if smaller is several_words:
                for j in members:
                    parent[root(j)] = root(members[0])
    number: dict[int, int] = {}
    return [number.setdefault(root(i), len(number)) for i in range(len(names))]


def order(salt: str, text: str) -> str:
    """A fixed shuffle: sort by this hash, the same on every machine."""
    return hashlib.sha256(f"ambient_sd {salt} {text}".encode()).hexdigest()
