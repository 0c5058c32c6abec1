"""Templates of logic: orders, seats, owners, knights and knaves, syllogisms and sequences.

Puzzles are solved by trying every case.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from random import Random

from training_data.question import NAMES, Question, listed, ordinal

KINDS = "wug blick tove fep zorp mim larp kiv dord gorp nib plon quib rint snib trob vunk glim".split()
PETS = ("cat", "dog", "rabbit", "parrot", "hamster", "turtle", "goldfish", "pony")
COMPARISONS = (("taller", "shorter"), ("older", "younger"), ("faster", "slower"), ("richer", "poorer"))

# A clue: its words, and a function that says whether an arrangement agrees with it.
Clue = tuple[str, Callable[[tuple[str, ...]], bool]]


# ---- arrangements: who stands where ----


def _fitting(people: Sequence[str], clues: Sequence[Clue]) -> list[tuple[str, ...]]:
    """All arrangements of the people that agree with every clue."""
    return [order for order in itertools.permutations(people) if all(agrees(order) for _, agrees in clues)]


def _enough_clues(rng: Random, people: Sequence[str], candidates: list[Clue]) -> list[Clue]:
    """A shuffled choice of clues that leaves one arrangement and has no superfluous clue.

    All candidates together must leave one arrangement.
    """
    rng.shuffle(candidates)
    clues = list(candidates)
    for clue in candidates:
        fewer = [other for other in clues if other is not clue]
        if len(_fitting(people, fewer)) == 1:
            clues = fewer
    assert len(_fitting(people, clues)) == 1, "the clues do not settle the arrangement"
    return clues


def _elimination(people: Sequence[str], clues: Sequence[Clue], last: str) -> list[str]:
    """Steps that say how many arrangements are left after each clue, and the step `last`."""
    steps = [f"First, there are {len(_fitting(people, []))} possible arrangements."]
    for number, (words, _) in enumerate(clues, start=1):
        left = len(_fitting(people, clues[:number]))
        steps.append(f"Clue {number} ({words}) leaves {left} of them.")
    return [*steps, last]


def order_of_three(rng: Random) -> Question:
    people = rng.sample(NAMES, 3)
    more, less = rng.choice(COMPARISONS)

    def compare(a: str, b: str) -> Clue:
        """A clue that says that a has more of the quality than b."""
        words = f"{a} is {more} than {b}" if rng.random() < 0.5 else f"{b} is {less} than {a}"
        return words, lambda order: order.index(a) < order.index(b)

    clues = [compare(*people[:2]), compare(*people[1:])]
    rng.shuffle(clues)
    (order,) = _fitting(sorted(people), clues)
    asked = rng.choice((f"the {_superlative(more)}", f"the {_superlative(less)}", "in the middle"))
    answer = order[(f"the {_superlative(more)}", "in the middle", f"the {_superlative(less)}").index(asked)]
    steps = [f"We know that {words}." for words, _ in clues]
    steps.append(f"Then the order from {more} to {less} is {', '.join(order)}.")
    return Question(f"{'. '.join(words for words, _ in clues)}. Who is {asked} of the three?", answer, steps)


def _superlative(comparative: str) -> str:
    return comparative.removesuffix("r") + "st"


def race(rng: Random) -> Question:
    people = rng.sample(NAMES, 4)
    hidden = tuple(people)
    clues: list[Clue] = []
    for i, a in enumerate(hidden):
        for b in hidden[i + 1 :]:
            earlier = rng.random() < 0.5
            words = f"{a} finished before {b}" if earlier else f"{b} finished after {a}"
            clues.append((words, lambda order, a=a, b=b: order.index(a) < order.index(b)))
    for a, b in rng.sample(list(itertools.pairwise(hidden)), 1):
        words = f"{b} finished directly after {a}"
        clues.append((words, lambda order, a=a, b=b: order.index(a) + 1 == order.index(b)))
    clues = _enough_clues(rng, sorted(people), clues)
    place = rng.randrange(4)
    text = (
        f"{listed(sorted(people))} ran a race without ties. {'. '.join(words for words, _ in clues)}. "
        f"Who finished {ordinal(place + 1)}?"
    )
    steps = _elimination(sorted(people), clues, f"Then the order of arrival is {', '.join(hidden)}.")
    return Question(text, hidden[place], steps)


def seats(rng: Random) -> Question:
    people = rng.sample(NAMES, 5)
    hidden = tuple(people)
    clues: list[Clue] = []
    for a, b in itertools.pairwise(hidden):
        a, b = (a, b) if rng.random() < 0.5 else (b, a)
        words = f"{a} sits directly next to {b}"
        clues.append((words, lambda order, a=a, b=b: abs(order.index(a) - order.index(b)) == 1))
    for a, b in rng.sample(list(itertools.combinations(hidden, 2)), 5):
        words = f"{a} sits somewhere to the left of {b}"
        clues.append((words, lambda order, a=a, b=b: order.index(a) < order.index(b)))
    for i in rng.sample(range(5), 2):
        if i in (0, 4):
            clues.append((f"{hidden[i]} sits at an end", lambda order, a=hidden[i]: order.index(a) in (0, 4)))
        else:
            clues.append(
                (f"{hidden[i]} does not sit at an end", lambda order, a=hidden[i]: order.index(a) in (1, 2, 3))
            )
    middle = hidden[2]
    clues.append((f"{middle} sits in the middle seat", lambda order: order[2] == middle))
    clues.append((f"{hidden[0]} sits left of the middle", lambda order: order.index(hidden[0]) < 2))
    clues = _enough_clues(rng, sorted(people), clues)
    seat = rng.randrange(5)
    text = (
        f"{listed(sorted(people))} sit in a row of five seats, numbered 1 to 5 from left to right. "
        f"{'. '.join(words for words, _ in clues)}. Who sits in seat {seat + 1}?"
    )
    steps = _elimination(sorted(people), clues, f"Then the seats from left to right hold {', '.join(hidden)}.")
    return Question(text, hidden[seat], steps)


def owners(rng: Random) -> Question:
    people, pets = sorted(rng.sample(NAMES, 4)), sorted(rng.sample(PETS, 4))
    hidden = tuple(rng.sample(people, 4))  # the solution: hidden[i] owns pets[i]
    clues: list[Clue] = []
    for person in people:
        for i, pet in enumerate(pets):
            if hidden[i] != person:
                words = f"{person} does not own the {pet}"
                clues.append((words, lambda order, i=i, person=person: order[i] != person))
    i, j = rng.sample(range(4), 2)
    names = sorted((hidden[i], hidden[j]))
    words = f"{listed(names)} own the {pets[min(i, j)]} and the {pets[max(i, j)]}, in some order"
    clues.append((words, lambda order: {order[i], order[j]} == set(names)))
    clues = _enough_clues(rng, people, clues)
    asked = rng.randrange(4)
    text = (
        f"{listed(people)} each own a different one of these pets: {listed(pets)}. "
        f"{'. '.join(words for words, _ in clues)}. Who owns the {pets[asked]}?"
    )
    pairs = [f"{person} owns the {pet}" for person, pet in zip(hidden, pets, strict=True)]
    return Question(text, hidden[asked], _elimination(people, clues, f"Then {listed(pairs)}."))


# ---- knights and knaves ----


def _statement(rng: Random, me: int, people: Sequence[str]) -> tuple[str, Callable[[tuple[bool, ...]], bool]]:
    other = rng.choice([i for i in range(len(people)) if i != me])
    name, everyone = people[other], len(people)
    return rng.choice(
        (
            (f"{name} is a knight", lambda w: w[other]),
            (f"{name} is a knave", lambda w: not w[other]),
            (f"{name} and I are of the same kind", lambda w: w[me] == w[other]),
            (f"{name} and I are of different kinds", lambda w: w[me] != w[other]),
            (f"at least one of {name} and me is a knave", lambda w: not (w[me] and w[other])),
            (f"{name} and I are both knaves", lambda w: not w[me] and not w[other]),
            (f"exactly 1 of us {everyone} is a knight", lambda w: sum(w) == 1),
            (f"exactly 1 of us {everyone} is a knave", lambda w: sum(w) == everyone - 1),
        )
    )


def _knights(rng: Random, num_people: int) -> Question:
    people = sorted(rng.sample(NAMES, num_people))
    worlds = list(itertools.product((True, False), repeat=num_people))  # True for a knight
    solutions: list[tuple[bool, ...]] = []
    while len(solutions) != 1:
        said = [_statement(rng, i, people) for i in range(num_people)]
        solutions = [w for w in worlds if all(holds(w) == w[i] for i, (_, holds) in enumerate(said))]
    steps = []
    for world in worlds:
        case = listed([f"{n} is a {'knight' if k else 'knave'}" for n, k in zip(people, world, strict=True)])
        clash = next((i for i, (_, holds) in enumerate(said) if holds(world) != world[i]), None)
        if clash is None:
            steps.append(f"Suppose {case}: then every statement fits.")
        else:
            truth = "true, but a knave lies" if said[clash][1](world) else "false, but a knight tells the truth"
            steps.append(f"Suppose {case}: then what {people[clash]} says is {truth}.")
    answer = ", ".join(name for name, knight in zip(people, solutions[0], strict=True) if knight) or "none"
    speeches = " ".join(f'{name} says: "{words}."' for name, (words, _) in zip(people, said, strict=True))
    text = (
        f"On an island knights always tell the truth and knaves always lie. You meet {listed(people)}. {speeches} "
        "Who are the knights? Give their names in alphabetical order, separated by commas, or none."
    )
    return Question(text, answer, steps)


def two_islanders(rng: Random) -> Question:
    return _knights(rng, 2)


def three_islanders(rng: Random) -> Question:
    return _knights(rng, 3)


# ---- syllogisms: a world says which of the seven combinations of three kinds exist ----

FORMS = ("All {}s are {}s", "No {}s are {}s", "Some {}s are {}s", "Some {}s are not {}s")
Proposition = tuple[int, int, int]  # the number of its form, and those of its two kinds
COMBINATIONS = tuple(itertools.product((True, False), repeat=3))[:-1]  # all but the things of no kind


def _holds(world: Sequence[tuple[bool, ...]], proposition: Proposition) -> bool:
    form, a, b = proposition
    first = [thing for thing in world if thing[a]]
    return (
        all(thing[b] for thing in first),
        not any(thing[b] for thing in first),
        any(thing[b] for thing in first),
        not all(thing[b] for thing in first),
    )[form]


@functools.cache
def _worlds() -> list[list[tuple[bool, ...]]]:
    """All worlds in which each kind has a member; worlds with fewer combinations come first."""
    chosen = (list(itertools.combinations(COMBINATIONS, size)) for size in range(1, 8))
    return [list(w) for worlds in chosen for w in worlds if all(any(thing[k] for thing in w) for k in range(3))]


@functools.cache
def _examples(premises: tuple[Proposition, ...], conclusion: Proposition) -> tuple[list | None, list | None]:
    """Of the worlds in which the premises hold: the smallest where the conclusion is true, and where it is false."""
    allowed = [world for world in _worlds() if all(_holds(world, premise) for premise in premises)]
    true = next((world for world in allowed if _holds(world, conclusion)), None)
    return true, next((world for world in allowed if not _holds(world, conclusion)), None)


def _in_words(proposition: Proposition, kinds: Sequence[str]) -> str:
    return FORMS[proposition[0]].format(kinds[proposition[1]], kinds[proposition[2]])


def _members(world: Sequence[tuple[bool, ...]], kinds: Sequence[str]) -> str:
    things = [listed([f"a {kind}" for kind, is_one in zip(kinds, thing, strict=True) if is_one]) for thing in world]
    return "; ".join(f"one that is {thing}" for thing in things)


def chain_of_kinds(rng: Random) -> Question:
    kinds, name = rng.sample(KINDS, 3), rng.choice(NAMES)
    premises = ((0, 0, 1), (rng.choice((0, 1)), 1, 2))
    _, not_all = _examples(premises, (0, 0, 2))
    _, not_none = _examples(premises, (1, 0, 2))
    assert (not_all is None) != (not_none is None), "the premises settle it one way"
    answer = "yes" if not_all is None else "no"
    first, second = (_in_words(premise, kinds) for premise in premises)
    steps = (
        f"First, {name} is a {kinds[0]}, and {first.lower()}, so {name} is a {kinds[1]}.",
        f"Then, because {second.lower()}, {name} is {'a' if answer == 'yes' else 'not a'} {kinds[2]}.",
    )
    facts = ". ".join(rng.sample((first, second), 2))
    text = f"{facts}. {name} is a {kinds[0]}. Is {name} a {kinds[2]}? Answer yes or no."
    return Question(text, answer, steps)


def syllogism(rng: Random) -> Question:
    kinds, wanted = rng.sample(KINDS, 3), rng.choice(("yes", "no", "unknown"))
    answer = ""
    while answer != wanted:
        ends = [rng.sample(pair, 2) for pair in ((0, 1), (1, 2), (0, 2))]
        *premises, conclusion = [(rng.randrange(4), a, b) for a, b in ends]
        true, false = _examples(tuple(premises), conclusion)
        answer = "yes" if false is None else "no" if true is None else "unknown"
    first, second, last = (_in_words(p, kinds) for p in (*premises, conclusion))
    steps = [f"The premises are: {first}; {second}."]
    if true is not None:
        steps.append(f"It can be true, for example with just these things: {_members(true, kinds)}.")
    else:
        steps.append("First, in no case that the premises allow is it true.")
    if false is not None:
        steps.append(f"It can be false, for example with just these things: {_members(false, kinds)}.")
    else:
        steps.append("Then, in no case that the premises allow is it false.")
    text = (
        f"There is at least one {kinds[0]}, one {kinds[1]} and one {kinds[2]}. {first}. {second}. "
        f'Is it true that "{last}"? Answer yes, no, or unknown if the facts do not settle it.'
    )
    return Question(text, answer, steps)


# ---- sequences ----


def _next_number(values: Sequence[int], steps: Sequence[str]) -> Question:
    """The question for the last of the values, which shows the others."""
    shown = ", ".join(map(str, values[:-1]))
    return Question(f"What number comes next in the sequence {shown}, ...?", str(values[-1]), steps)


def equal_steps(rng: Random) -> Question:
    start, step = rng.randint(1, 60), rng.choice([n for n in range(-15, 26) if abs(n) > 1])
    values = [start + step * i for i in range(6)]
    sign = "+" if step > 0 else "-"
    return _next_number(
        values,
        (
            f"First, the step is the same each time: {values[1]} - {values[0]} = {step}.",
            f"Then {values[4]} {sign} {abs(step)} = {values[5]}.",
        ),
    )


def growing_steps(rng: Random) -> Question:
    start, step, growth = rng.randint(1, 40), rng.randint(1, 12), rng.randint(1, 9)
    values = [start + step * i + growth * i * (i - 1) // 2 for i in range(7)]
    differences = [b - a for a, b in itertools.pairwise(values)]
    return _next_number(
        values,
        (
            f"First, the differences are {', '.join(map(str, differences[:-1]))}; each is {growth} larger.",
            f"Then the next difference is {differences[-2]} + {growth} = {differences[-1]}.",
            f"Therefore the next number is {values[-2]} + {differences[-1]} = {values[-1]}.",
        ),
    )


def multiply_and_add(rng: Random) -> Question:
    values, factor, term = [rng.randint(1, 60)], rng.randint(2, 5), rng.randint(-9, 12)
    while len(values) < 6:
        values.append(values[-1] * factor + term)
    if len(set(values)) < 6:  # the rule maps some number to itself, so the sequence does not change
        return multiply_and_add(rng)
    rule = f"times {factor}" + (f", then {'plus' if term > 0 else 'minus'} {abs(term)}" if term else "")
    tail = f" {'+' if term > 0 else '-'} {abs(term)}" if term else ""
    return _next_number(
        values,
        (
            f"First find the rule: each number is the one before it {rule}.",
            f"Check: {values[0]} * {factor}{tail} = {values[1]} and {values[1]} * {factor}{tail} = {values[2]}.",
            f"Then {values[4]} * {factor}{tail} = {values[5]}.",
        ),
    )


def sum_of_last_two(rng: Random) -> Question:
    values = [rng.randint(1, 60), rng.randint(1, 60)]
    while len(values) < 7:
        values.append(values[-2] + values[-1])
    return _next_number(
        values,
        (
            f"First, each number is the sum of the two before it: {values[0]} + {values[1]} = {values[2]}.",
            f"Then {values[4]} + {values[5]} = {values[6]}.",
        ),
    )


def two_in_turn(rng: Random) -> Question:
    a, b = rng.randint(1, 40), rng.randint(1, 40)
    up, factor = rng.randint(2, 15), rng.choice((2, 3))
    values = [n for i in range(4) for n in (a + up * i, b * factor**i)]
    asked = values[: rng.choice((7, 8))]
    if len(asked) == 7:
        odd, last = "1st, 3rd and 5th", f"{asked[4]} + {up} = {asked[6]}"
    else:
        odd, last = "2nd, 4th and 6th", f"{asked[5]} * {factor} = {asked[7]}"
    return _next_number(
        asked,
        (
            "First, two sequences take turns.",
            f"One is {values[0]}, {values[2]}, {values[4]}, which adds {up} each time.",
            f"The other is {values[1]}, {values[3]}, {values[5]}, which multiplies by {factor} each time.",
            f"Then the next number continues the {odd}: {last}.",
        ),
    )


TEMPLATES = {
    "easy": (equal_steps, order_of_three, chain_of_kinds),
    "medium": (growing_steps, sum_of_last_two, race, two_islanders, syllogism),
    "hard": (multiply_and_add, two_in_turn, seats, owners, three_islanders),
}
