"""bioS: synthetic biographies of people who do not exist ("Physics of Language Models: Part 3.3", Allen-Zhu and Li,
2024, arXiv 2404.05405, section 2).

A person is a name and five attributes, each drawn uniformly and independently from lists of the paper's sizes; the city
of work follows from the employer. One biography, or exposure, has a sentence an attribute. Order and wording of the
sentences are drawn anew for every exposure. The full name opens the document; a pronoun takes its place after that.

Everything follows from a seed: the same people, and the same text of every exposure.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from apps.capacity.templates import TEMPLATES
from lingua.errors import UserError

N_FIRST, N_MIDDLE, N_LAST = 400, 400, 1000
N_YEARS, N_MONTHS, N_DAYS = 200, 12, 28
N_CITIES, N_UNIVERSITIES, N_MAJORS, N_EMPLOYERS = 200, 300, 100, 263

N_NAMES = N_FIRST * N_MIDDLE * N_LAST
# Number of possible values; the city of work adds no information.
ATTRIBUTES = {
    "birth_date": N_YEARS * N_MONTHS * N_DAYS,
    "birth_city": N_CITIES,
    "university": N_UNIVERSITIES,
    "major": N_MAJORS,
    "employer": N_EMPLOYERS,
}

MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
FIELDS = (
    "Biology",
    "Chemistry",
    "Design",
    "Economics",
    "History",
    "Law",
    "Linguistics",
    "Music",
    "Physics",
    "Statistics",
)
BRANCHES = (
    "Applied",
    "Comparative",
    "Computational",
    "Cultural",
    "Experimental",
    "General",
    "Marine",
    "Medical",
    "Modern",
    "Social",
)
SCHOOLS = ("University", "College", "Institute of Technology", "State University", "Polytechnic")
FIRMS = ("Systems", "Foods", "Airlines", "Energy", "Bank", "Motors", "Pharma", "Media", "Steel", "Insurance")

# Biographies in a chunk file, at most: a file is written by one process.
CHUNK_DOCUMENTS = 100_000


@dataclass(frozen=True)
class Biography:
    """`spans`: "name" and each attribute -> where its value begins and ends in `text`, in characters."""

    text: str
    spans: dict[str, tuple[int, int]]


def make_words(n: int, suffixes: tuple[str, ...], salt: int) -> list[str]:
    """`n` capitalized words out of syllables, all different, none the same for another `salt`."""
    onsets = (
        "b",
        "br",
        "c",
        "d",
        "dr",
        "f",
        "g",
        "gr",
        "h",
        "j",
        "k",
        "l",
        "m",
        "n",
        "p",
        "r",
        "s",
        "st",
        "t",
        "tr",
        "v",
        "w",
        "z",
    )
    vowels = ("a", "e", "i", "o", "u")
    stems = [
        "".join(parts).capitalize() + suffix
        for parts in itertools.product(onsets, vowels, onsets, vowels)
        for suffix in suffixes
    ]
    rng = np.random.default_rng((20240405, salt))
    return [stems[i] for i in rng.permutation(len(stems))[:n]]


FIRST_NAMES = make_words(N_FIRST, ("n", "lia", "s"), 0)
MIDDLE_NAMES = make_words(N_MIDDLE, ("x", "mir", "th"), 1)
LAST_NAMES = make_words(N_LAST, ("son", "ski", "berg", "ley"), 2)
CITIES = make_words(N_CITIES, ("ville", "ton", "port", "burg"), 3)
UNIVERSITIES = [
    f"{word} {SCHOOLS[i % len(SCHOOLS)]}" for i, word in enumerate(make_words(N_UNIVERSITIES, ("ford", "ham"), 4))
]
MAJORS = [f"{branch} {field}" for branch in BRANCHES for field in FIELDS]
EMPLOYERS = [f"{word} {FIRMS[i % len(FIRMS)]}" for i, word in enumerate(make_words(N_EMPLOYERS, ("co", "tex"), 5))]
WORK_CITIES = [CITIES[i] for i in np.random.default_rng(20240405).integers(N_CITIES, size=N_EMPLOYERS)]


class People:
    """`n` people with different names, drawn by `seed`. Raises UserError where there are fewer names than that."""

    def __init__(self, n: int, seed: int = 0):
        if not 1 <= n <= N_NAMES // 2:
            raise UserError(f"people: {n} must be between 1 and {N_NAMES // 2}, half of the number of possible names")
        self.n, self.seed = n, seed
        rng = np.random.default_rng((seed, 0))
        drawn = rng.integers(N_NAMES, size=n + n // 2 + 100)
        names = drawn[np.sort(np.unique(drawn, return_index=True)[1])]
        while len(names) < n:
            drawn = np.concatenate([names, rng.integers(N_NAMES, size=n)])
            names = drawn[np.sort(np.unique(drawn, return_index=True)[1])]
        self._names = names[:n]
        self._values = np.stack([rng.integers(size, size=n) for size in ATTRIBUTES.values()], axis=1)
        self._is_female = rng.integers(2, size=n)

    @property
    def bits(self) -> float:
        """What knowing everything about these people amounts to."""
        return self.n * (math.log2(N_NAMES / self.n) + sum(math.log2(size) for size in ATTRIBUTES.values()))

    def name(self, person: int) -> str:
        rest, last = divmod(int(self._names[person]), N_LAST)
        first, middle = divmod(rest, N_MIDDLE)
        return f"{FIRST_NAMES[first]} {MIDDLE_NAMES[middle]} {LAST_NAMES[last]}"

    def values(self, person: int) -> dict[str, str]:
        """Attribute -> its value as it is written; `work_city` too."""
        date, city, university, major, employer = map(int, self._values[person])
        year, day = divmod(date, N_MONTHS * N_DAYS)
        month, day = divmod(day, N_DAYS)
        return {
            "birth_date": f"{MONTHS[month]} {day + 1}, {1900 + year}",
            "birth_city": CITIES[city],
            "university": UNIVERSITIES[university],
            "major": MAJORS[major],
            "employer": EMPLOYERS[employer],
            "work_city": WORK_CITIES[employer],
        }

    def biography(self, person: int, rng: np.random.Generator) -> Biography:
        """One exposure of a person; its wording and order are drawn from `rng`."""
        values = self.values(person)
        name, pronouns = self.name(person), (("He", "His"), ("She", "Her"))[self._is_female[person]]
        parts, spans, length = [], {"name": (0, len(name))}, 0
        order = rng.permutation(len(TEMPLATES))
        choices = rng.integers(len(TEMPLATES["birth_date"]), size=len(TEMPLATES))
        for place, number in enumerate(order):
            attribute = _NAMES[number]
            before, after = _SPLIT[attribute][choices[number]]
            if place == 0:
                sentence = name + before
            elif before.startswith("'s"):
                sentence = " " + pronouns[1] + before[2:]
            else:
                sentence = " " + pronouns[0] + before
            begin = length + len(sentence)
            spans[attribute] = (begin, begin + len(values[attribute]))
            sentence += values[attribute] + after
            parts.append(sentence)
            length += len(sentence)
        return Biography("".join(parts), spans)

    def exposures(self, number: int) -> Iterator[Biography]:
        """Exposure `number` of everybody, in its own order."""
        rng = np.random.default_rng((self.seed, 1, number))
        for person in rng.permutation(self.n):
            yield self.biography(int(person), rng)

    @cached_property
    def for_measurement(self) -> list[Biography]:
        """One biography of each person, in their order, which no exposure repeats but by chance."""
        rng = np.random.default_rng((self.seed, 2))
        return [self.biography(person, rng) for person in range(self.n)]


_NAMES = tuple(TEMPLATES)
_SPLIT = {name: [tuple(line.split("_")) for line in lines] for name, lines in TEMPLATES.items()}


def write_exposures(people: People, exposures: int, folder: Path, workers: int) -> None:
    """Training data: `exposures` biographies of everybody as `bios.chunk.NNNN.jsonl`, one pass over the people after
    the other. Files that are there are not written again.

    Raises OSError where they cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    per_file = max(1, CHUNK_DOCUMENTS // people.n)
    jobs = [
        (folder / f"bios.chunk.{number:04d}.jsonl", range(first, min(first + per_file, exposures)))
        for number, first in enumerate(range(0, exposures, per_file))
    ]
    jobs = [job for job in jobs if not job[0].exists()]
    if not jobs:
        return
    with ProcessPoolExecutor(min(workers, len(jobs))) as pool:
        list(pool.map(_write_chunk, itertools.repeat(people), *zip(*jobs, strict=True)))


def _write_chunk(people: People, file: Path, numbers: range) -> None:
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    with unfinished.open("w") as out:
        for number in numbers:
            out.writelines(json.dumps({"text": biography.text}) + "\n" for biography in people.exposures(number))
    unfinished.rename(file)
