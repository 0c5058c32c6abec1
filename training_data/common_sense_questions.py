"""Templates of common sense: calendar and clock, counting, queues, coins, and things put in order."""

import calendar
import functools
import math
from datetime import date, datetime, timedelta
from random import Random

from training_data.question import NAMES, Question, listed, ordinal

WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January February March April May June July August September October November December".split()
)  # fmt: skip
LEGS = {"dogs": 4, "hens": 2, "spiders": 8, "ants": 6, "cows": 4, "ducks": 2, "cats": 4, "bees": 6, "people": 2}
WORDS = (
    "apple bridge candle desert engine forest garden hammer island jacket kettle ladder mirror needle orange pepper "
    "quartz ribbon saddle timber umbrella violin window yellow zebra basket carpet dragon feather glacier harbor "
    "lantern marble nectar pillow rocket silver tunnel valley walnut"
).split()
COINS = ((25, 10, 5, 1), (50, 25, 10, 5, 1), (50, 20, 10, 5, 2, 1), (100, 50, 20, 10, 5, 1))
MAX_CENTS = 900


def _dated(day: date) -> str:
    return f"{day.day} {MONTHS[day.month - 1]} {day.year}"


def _any_date(rng: Random) -> date:
    return date(2000, 1, 1) + timedelta(days=rng.randrange(36525))


def _clock(moment: datetime | int) -> str:
    """A moment, or a number of minutes after midnight, as HH:MM."""
    if isinstance(moment, int):
        return f"{moment // 60:02d}:{moment % 60:02d}"
    return f"{moment:%H:%M}"


# ---- easy ----


def weekday_later(rng: Random) -> Question:
    today, days, later = rng.randrange(7), rng.randint(3, 150), rng.random() < 0.5
    shift = days if later else -days
    answer = WEEKDAYS[(today + shift) % 7]
    text = (
        f"Today is {WEEKDAYS[today]}. What day of the week will it be in {days} days?"
        if later
        else f"Today is {WEEKDAYS[today]}. What day of the week was it {days} days ago?"
    )
    steps = (
        f"First, weeks repeat: {days} - {days // 7} * 7 = {days % 7}.",
        f"Then count {days % 7} {'forward' if later else 'back'} from {WEEKDAYS[today]}, which is {answer}.",
    )
    return Question(text, answer, steps)


def clock_later(rng: Random) -> Question:
    start = datetime(2000, 1, 1, rng.randint(5, 20), 5 * rng.randrange(12))
    minutes, name = rng.randint(11, 170), rng.choice(NAMES)
    thing = rng.choice(("A film", "A train ride", "A concert", "A walk", "A meeting", "A match"))
    end = start + timedelta(minutes=minutes)
    text = (
        f"{thing} of {name} starts at {_clock(start)} and takes {minutes} minutes. When does it end, as HH:MM (24 h)?"
    )
    total = start.minute + minutes
    steps = (
        f"First, the minutes: {start.minute} + {minutes} = {total}.",
        f"That is {total // 60} full hours and {total} - {total // 60} * 60 = {total % 60} minutes.",
        f"Then the hours: {start.hour} + {total // 60} = {start.hour + total // 60}, so it ends at {_clock(end)}.",
    )
    return Question(text, _clock(end), steps, (start, minutes))


def legs(rng: Random) -> Question:
    kinds = rng.sample(list(LEGS), 2)
    counts = [rng.randint(2, 15) for _ in kinds]
    parts = [LEGS[kind] * num for kind, num in zip(kinds, counts, strict=True)]
    group = listed([f"{num} {kind}" for kind, num in zip(kinds, counts, strict=True)])
    steps = [
        f"The {kind} have {num} * {LEGS[kind]} = {part} legs."
        for kind, num, part in zip(kinds, counts, parts, strict=True)
    ]
    steps.append(f"Then {parts[0]} + {parts[1]} = {sum(parts)} legs.")
    problem = tuple(sorted(zip(kinds, counts, strict=True)))
    return Question(f"How many legs do {group} have altogether?", str(sum(parts)), steps, problem)


def dictionary_order(rng: Random) -> Question:
    words, last = rng.sample(WORDS, 4), rng.random() < 0.5
    in_order = sorted(words)
    which = "last" if last else "first"
    steps = (f"In alphabetical order they are {', '.join(in_order)}.",)
    text = f"Which of these words comes {which} in a dictionary: {', '.join(words)}?"
    return Question(text, in_order[-1 if last else 0], steps, (which, *in_order))


# ---- medium ----


def days_between(rng: Random) -> Question:
    start = _any_date(rng)
    end = start + timedelta(days=rng.randint(15, 160))
    parts, first = [], date(start.year, start.month, 1)
    month_end = first + timedelta(days=calendar.monthrange(first.year, first.month)[1] - 1)
    # Each part counts the days of one month that lie after the start.
    while month_end < end:
        parts.append((month_end - max(start, first - timedelta(days=1))).days)
        first = month_end + timedelta(days=1)
        month_end = first + timedelta(days=calendar.monthrange(first.year, first.month)[1] - 1)
    parts.append((end - max(start, first - timedelta(days=1))).days)
    total = (end - start).days
    months = [MONTHS[(start.month - 1 + i) % 12] for i in range(len(parts))]
    pieces = [f"{num} in {month}" for num, month in zip(parts, months, strict=True)]
    steps = [f"First, count the days after {_dated(start)} month by month: {listed(pieces)}."]
    if len(parts) > 1:
        steps.append(f"Then {' + '.join(map(str, parts))} = {total}.")
    return Question(f"How many days are there from {_dated(start)} to {_dated(end)}?", str(total), steps)


def night_train(rng: Random) -> Question:
    start = datetime(2000, 1, 1, rng.randint(17, 23), rng.randrange(60))
    end = datetime(2000, 1, 2, rng.randint(1, 11), rng.randrange(60))
    before, after = (datetime(2000, 1, 2) - start).seconds // 60, (end - datetime(2000, 1, 2)).seconds // 60
    total = int((end - start).total_seconds()) // 60
    thing = rng.choice(("night train", "ferry", "night bus", "flight"))
    text = (
        f"A {thing} leaves at {_clock(start)} and arrives at {_clock(end)} the next morning, in the same time zone. "
        "How many minutes does it take?"
    )
    steps = (
        f"First, until midnight: 24 * 60 - {start.hour} * 60 - {start.minute} = {before} minutes.",
        f"Then after midnight: {end.hour} * 60 + {end.minute} = {after} minutes.",
        f"Together {before} + {after} = {total} minutes.",
    )
    return Question(text, str(total), steps, (start, end))


def queue(rng: Random) -> Question:
    front, back, name = rng.randint(3, 60), rng.randint(3, 60), rng.choice(NAMES)
    total = front + back - 1
    if rng.random() < 0.5:
        text = (
            f"In a queue {name} is {ordinal(front)} from the front and {ordinal(back)} from the back. "
            "How many people are in the queue?"
        )
        steps = (
            f"{name} is counted from both sides, so one has to be taken off.",
            f"Then {front} + {back} - 1 = {total}.",
        )
        return Question(text, str(total), steps, ("all", front, back))
    text = f"In a queue of {total} people {name} is {ordinal(front)} from the front. How many people are behind {name}?"
    return Question(text, str(back - 1), (f"Behind {name} are {total} - {front} = {back - 1} people.",), (front, back))


@functools.cache
def _fewest(coins: tuple[int, ...]) -> list[int]:
    """The smallest number of coins for each amount up to MAX_CENTS."""
    fewest = [0]
    for amount in range(1, MAX_CENTS + 1):
        fewest.append(1 + min(fewest[amount - coin] for coin in coins if coin <= amount))
    return fewest


def fewest_coins(rng: Random) -> Question:
    coins, cents = rng.choice(COINS), rng.randint(13, MAX_CENTS)
    steps, rest, total = [], cents, 0
    for coin in coins:
        if coin <= rest:
            num, left = divmod(rest, coin)
            steps.append(f"Take {num} of {coin} cents: {rest} - {num} * {coin} = {left} cents are left.")
            rest, total = left, total + num
    assert total == _fewest(coins)[cents], "with these coins it is best to take the largest first"
    steps.append(f"In all that is {total}, and every larger coin was used as often as possible.")
    kinds = listed([str(coin) for coin in coins])
    text = f"What is the smallest number of coins that makes {cents} cents, with coins of {kinds} cents?"
    return Question(text, str(total), steps)


def oldest(rng: Random) -> Question:
    people = rng.sample(NAMES, 4)
    year = rng.randint(1960, 2010)
    days = [date(year, 1, 1) + timedelta(days=n) for n in rng.sample(range(1000), 4)]
    by_age = sorted(zip(days, people, strict=True))
    place = rng.randrange(4)
    asked = ("the oldest", "the second oldest", "the second youngest", "the youngest")[place]
    births = [f"{name} was born on {_dated(day)}" for name, day in zip(people, days, strict=True)]
    steps = [
        f"First, the dates from early to late are {', '.join(_dated(day) for day, _ in by_age)}.",
        f"Then from oldest to youngest they are {', '.join(name for _, name in by_age)}.",
    ]
    return Question(f"{'. '.join(births)}. Who is {asked}?", by_age[place][1], steps)


# ---- hard ----


def weekday_of_date(rng: Random) -> Question:
    start = _any_date(rng)
    end = start + timedelta(days=rng.randint(40, 400))
    days, answer = (end - start).days, WEEKDAYS[end.weekday()]
    steps = (
        f"First, from {_dated(start)} to {_dated(end)} there are {days} days.",
        f"Then take off whole weeks: {days} - {days // 7} * 7 = {days % 7}.",
        f"Finally count {days % 7} forward from {WEEKDAYS[start.weekday()]}, which is {answer}.",
    )
    text = f"{_dated(start)} is a {WEEKDAYS[start.weekday()]}. What day of the week is {_dated(end)}?"
    return Question(text, answer, steps)


def working_days(rng: Random) -> Question:
    start = _any_date(rng)
    num = rng.randint(10, 60)
    days = [start + timedelta(days=n) for n in range(num)]
    answer = sum(day.weekday() < 5 for day in days)
    over = [WEEKDAYS[day.weekday()] for day in days[num // 7 * 7 :]]
    extra = answer - 5 * (num // 7)
    steps = [
        f"First, these are {num} days: {num // 7} whole weeks with {num // 7} * 5 = {num // 7 * 5} working days.",
        f"Then {listed(over)} remain, of which {extra} are working days." if over else "Then no day remains.",
        f"Together {num // 7 * 5} + {extra} = {answer}.",
    ]
    text = (
        f"{_dated(start)} is a {WEEKDAYS[start.weekday()]}. How many days from Monday to Friday are there from "
        f"{_dated(start)} to {_dated(days[-1])}, both included?"
    )
    return Question(text, str(answer), steps)


def meet_again(rng: Random) -> Question:
    start, people = _any_date(rng), rng.sample(NAMES, 2)
    a, b = sorted(rng.sample(range(2, 19), 2))
    days = math.lcm(a, b)
    answer = _dated(start + timedelta(days=days))
    place = rng.choice(("the pool", "the library", "the gym", "the market"))
    text = (
        f"{people[0]} goes to {place} every {a} days and {people[1]} every {b} days. Both are there on "
        f"{_dated(start)}. On which date are both there the next time? Answer like {_dated(start)}."
    )
    steps = (
        f"First, the least common multiple of {a} and {b} is {days}: {days // a} * {a} = {days} and "
        f"{days // b} * {b} = {days}.",
        f"Then {days} days after {_dated(start)} is {answer}.",
    )
    return Question(text, answer, steps, (start, a, b))


def time_zones(rng: Random) -> Question:
    start = datetime(2000, 1, 2, rng.randrange(24), 5 * rng.randrange(12))
    minutes, shift = rng.randint(61, 840), rng.choice([n for n in range(-9, 10) if n])
    end = start + timedelta(minutes=minutes, hours=shift)
    hours, rest = divmod(minutes, 60)
    behind = "ahead of" if shift > 0 else "behind"
    text = (
        f"A plane takes off at {_clock(start)} local time and flies for {hours} h {rest} min. Clocks at "
        f"its destination are {abs(shift)} h {behind} those where it starts. What is the local time of arrival, as "
        "HH:MM (24 h)?"
    )
    there = start + timedelta(minutes=minutes)
    steps = (
        f"First, in the time zone of the start it arrives at {_clock(there)}.",
        f"Then the clocks there are {abs(shift)} h {behind} that, which makes {_clock(end)}.",
    )
    return Question(text, _clock(end), steps)


def free_time(rng: Random) -> Question:
    opening, closing, num = 8 * 60, 18 * 60, rng.choice((3, 4))
    meetings = []
    for _ in range(num):
        start = opening + 5 * rng.randrange(100)
        meetings.append((start, start + 5 * rng.randint(5, 20)))
    busy = {minute for start, end in meetings for minute in range(start, end)}
    assert max(busy) < closing
    free, name = closing - opening - len(busy), rng.choice(NAMES)
    merged: list[list[int]] = []
    for start, end in sorted(meetings):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, end])
    lengths = [end - start for start, end in merged]
    assert sum(lengths) == len(busy)
    spans = [f"{_clock(start)} to {_clock(end)}" for start, end in meetings]
    text = (
        f"{name} works from {_clock(opening)} to {_clock(closing)} and has meetings from {listed(spans)}; they may "
        f"overlap. How many minutes of the working time are free of meetings?"
    )
    joined = [f"{_clock(start)} to {_clock(end)} ({end - start} minutes)" for start, end in merged]
    steps = [f"First, in order and with overlaps joined, {name} is busy from {listed(joined)}."]
    if len(lengths) > 1:
        steps.append(f"Then {' + '.join(map(str, lengths))} = {sum(lengths)} minutes are taken.")
    steps.append(f"Finally 10 * 60 - {sum(lengths)} = {free} minutes are free.")
    return Question(text, str(free), steps, tuple(sorted(meetings)))


TEMPLATES = {
    "easy": (weekday_later, clock_later, legs, dictionary_order),
    "medium": (days_between, night_train, queue, fewest_coins, oldest),
    "hard": (weekday_of_date, working_days, meet_again, time_zones, free_time),
}
