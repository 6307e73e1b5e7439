"""English sentences for synthetic speech, written for Lalia: free to use, varied in length, sounds and kind."""

from __future__ import annotations

import random

WRITTEN = """
The old lighthouse keeper counted the ships as they passed.
Why did the orchestra stop in the middle of the second movement?
Please put the blue jug on the shelf above the window.
She measured twice, cut once, and still came up short.
A fox slipped through the hedge and vanished into the wheat.
Nothing grows well in the shadow of that tall brick wall.
He whistled the same three notes all the way to the harbour.
Could you tell me which platform the night train leaves from?
The recipe calls for ginger, honey, and a pinch of salt.
Thunder rolled over the valley long before the rain began.
My grandmother kept her letters in a wooden cigar box.
If the bridge is closed, we will have to take the ferry.
What a strange and beautiful machine you have built!
The children argued about who had seen the comet first.
Every Thursday the market fills with cheese and cut flowers.
Their voices echoed down the empty marble staircase.
I would rather walk than wait another hour for the bus.
The judge adjusted her glasses and read the verdict slowly.
Fresh snow muffled every sound in the narrow street.
Only the youngest sailor knew how to read the chart.
He joined the choir because he loved the quiet before the first chord.
Measure the width of the door before you order the piano.
Two brown owls watched us from the branch of a dead oak.
The engine coughed, sputtered, and finally came to life.
You should never trust a map that has no date on it.
In the autumn, the vineyard turns the colour of rust.
Who left the garden gate open during the storm?
The teacher drew a perfect circle without any compass.
Beyond the ridge lies a village of eleven houses.
Her new shoes squeaked on the polished gymnasium floor.
The pharmacist was out of the usual brand of cough syrup.
Zebras and giraffes gathered around the shrinking pool.
It is easier to ask for forgiveness than to find the right form.
Yesterday the thermometer outside the bakery read minus twelve.
The choice between them was neither simple nor urgent.
Jewels of dew hung on the spider's web at dawn.
We mixed yellow and blue until the paint looked like moss.
The goalkeeper threw himself to the left and guessed correctly.
Vivid dreams kept the young engineer awake for a week.
Pull the lever gently, or the whole shelf will fall.
""".strip().splitlines()

SUBJECTS = (
    "the captain", "my neighbour", "a retired teacher", "the young violinist", "our guide", "the night nurse",
    "an honest merchant", "the tall gardener", "her cousin", "the village doctor", "a quiet stranger",
    "the chief editor", "one of the twins", "the museum guard", "that clever mechanic", "the busy postman",
)  # fmt: skip
ACTIONS = (
    "repaired the broken clock", "carried a basket of pears", "painted the front door green", "forgot the umbrella",
    "told a long story about whales", "wrote seven letters", "found a silver coin", "lost the key to the cellar",
    "planted three rows of onions", "bought a cheap guitar", "asked for a glass of water", "sang an old folk song",
    "drew a map of the island", "baked fresh bread", "opened the wrong envelope", "chased the goose across the yard",
)  # fmt: skip
PLACES = (
    "near the railway station", "behind the theatre", "on the north side of the river", "under the chestnut trees",
    "at the edge of the forest", "in the crowded kitchen", "beside the frozen lake", "in front of the library",
    "on the top floor", "outside the town hall", "along the sandy path", "by the light of a candle",
)  # fmt: skip
TIMES = (
    "early this morning", "just before midnight", "on the first day of March", "after the long meeting",
    "last Wednesday", "while it was raining", "every other weekend", "an hour before sunset", "at noon",
)  # fmt: skip
QUESTIONS = (
    "Did you know that {s} {a} {t}?", "Is it true that {s} {a} {p}?", "Who would have guessed that {s} {a}?",
    "Have you heard why {s} {a} {t}?",
)  # fmt: skip
STATEMENTS = (
    "{S} {a} {p}.", "{S} {a} {t}.", "{T}, {s} {a} {p}.", "We were surprised that {s} {a} {t}.",
    "I believe {s} {a}, but nobody was there to see it.", "{P}, {s} {a} {t}.", "{S} {a}.",
    "Although it was late, {s} {a} {p}, and then went home without a word.",
)  # fmt: skip
MOST_SENTENCES = 2000
SEED = 20


def sentences(count: int) -> list[str]:
    """The first ``count`` sentences, all different; a longer list begins with the shorter one."""
    if not 0 <= count <= MOST_SENTENCES:
        raise ValueError(f"there are {MOST_SENTENCES} sentences, not {count}")
    source = random.Random(SEED)
    made = dict.fromkeys(WRITTEN)  # a dict keeps the order and drops repetitions
    while len(made) < count:
        made[_fill(source)] = None
    return list(made)[:count]


def _fill(source: random.Random) -> str:
    pattern = source.choice(QUESTIONS if source.random() < 0.2 else STATEMENTS)
    subject, place, time = source.choice(SUBJECTS), source.choice(PLACES), source.choice(TIMES)
    first_big = {"S": subject.capitalize(), "P": place.capitalize(), "T": time[0].upper() + time[1:]}
    return pattern.format(s=subject, a=source.choice(ACTIONS), p=place, t=time, **first_big)
