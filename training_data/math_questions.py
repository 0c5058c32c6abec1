"""Templates of mathematics: arithmetic, percentages, word problems, equations, divisors and primes."""

import math
from fractions import Fraction
from random import Random

from training_data.question import NAMES, Question, exact, signed

GOODS = ("notebook", "pencil", "mug", "sandwich", "ticket", "candle", "poster", "plant", "scarf", "lamp")


# ---- easy ----


def addition(rng: Random) -> Question:
    a, b = rng.randint(10, 299), rng.randint(10, 299)
    wording = rng.choice(("What is {a} + {b}?", "Add {a} and {b}.", "What is the sum of {a} and {b}?"))
    tens, ones = b - b % 10, b % 10
    steps = (f"First, {a} + {tens} = {a + tens}.", f"Then {a + tens} + {ones} = {a + b}.")
    return Question(wording.format(a=a, b=b), str(a + b), steps, (min(a, b), max(a, b)))


def subtraction(rng: Random) -> Question:
    b, a = sorted((rng.randint(10, 299), rng.randint(10, 299)))
    wording = rng.choice(("What is {a} - {b}?", "Subtract {b} from {a}.", "How much more is {a} than {b}?"))
    tens, ones = b - b % 10, b % 10
    steps = (f"First, {a} - {tens} = {a - tens}.", f"Then {a - tens} - {ones} = {a - b}.")
    return Question(wording.format(a=a, b=b), str(a - b), steps, (a, b))


def percentage(rng: Random) -> Question:
    percent, base = rng.choice((5, 10, 15, 20, 25, 30, 40, 50, 60, 70, 75, 80, 90)), 20 * rng.randint(2, 150)
    steps = (
        f"First, 1% of {base} is {base} / 100 = {exact(Fraction(base, 100))}.",
        f"Then {percent}% is {percent} * {exact(Fraction(base, 100))} = {percent * base // 100}.",
    )
    return Question(f"What is {percent}% of {base}?", str(percent * base // 100), steps)


def change(rng: Random) -> Question:
    num, price = rng.randint(2, 12), rng.randint(2, 40)
    paid = rng.choice([bill for bill in (20, 50, 100, 200, 500) if bill > num * price])
    name, thing = rng.choice(NAMES), rng.choice(GOODS)
    text = (
        f"{name} buys {num} of the same {thing} at ${price} each and pays with ${paid}. "
        f"How many dollars does {name} get back?"
    )
    steps = (
        f"First, the price is {num} * {price} = {num * price} dollars.",
        f"Then {name} gets back {paid} - {num * price} = {paid - num * price} dollars.",
    )
    return Question(text, str(paid - num * price), steps, (num, price, paid))


def one_step_equation(rng: Random) -> Question:
    x = rng.randint(2, 60)
    if rng.random() < 0.5:
        a = rng.randint(2, 80)
        step = f"Take {a} from both sides: x = {x + a} - {a} = {x}."
        return Question(f"Solve for x: x + {a} = {x + a}.", str(x), (step,))
    a = rng.randint(2, 15)
    return Question(f"Solve for x: {a}x = {a * x}.", str(x), (f"Divide both sides by {a}: x = {a * x} / {a} = {x}.",))


# ---- medium ----


def order_of_operations(rng: Random) -> Question:
    a, b, c = rng.randint(3, 60), rng.randint(3, 25), rng.randint(3, 25)
    kind = rng.randrange(3)
    if kind == 0:
        text, answer = f"{a} + {b} * {c}", a + b * c
        steps = (f"First multiply: {b} * {c} = {b * c}.", f"Then add: {a} + {b * c} = {answer}.")
    elif kind == 1:
        text, answer = f"({a} + {b}) * {c}", (a + b) * c
        steps = (f"First the brackets: {a} + {b} = {a + b}.", f"Then multiply: {a + b} * {c} = {answer}.")
    else:
        text, answer = f"{a} - {b} * {c}", a - b * c
        steps = (f"First multiply: {b} * {c} = {b * c}.", f"Then subtract: {a} - {b * c} = {answer}.")
    return Question(f"What is {text}?", str(answer), steps)


def discount(rng: Random) -> Question:
    price, percent, thing = rng.randint(20, 400), 5 * rng.randint(1, 14), rng.choice(GOODS)
    off = Fraction(price * percent, 100)
    text = f"The price of a {thing} is ${price}. Today it is {percent}% off. How many dollars does it cost today?"
    steps = (
        f"First, {percent}% of {price} is {price} * {percent} / 100 = {exact(off)}.",
        f"Then the price today is {price} - {exact(off)} = {exact(price - off)}.",
    )
    return Question(text, exact(price - off), steps, (price, percent))


def linear_equation(rng: Random) -> Question:
    a, b, x = rng.randint(2, 15), rng.choice([n for n in range(-40, 41) if n]), rng.randint(-15, 25)
    c = a * x + b
    steps = (
        f"First bring {abs(b)} to the other side: {a}x = {c} {signed(-b)} = {a * x}.",
        f"Then divide by {a}: x = {a * x} / {a} = {x}.",
    )
    return Question(f"Solve for x: {a}x {signed(b)} = {c}.", str(x), steps)


def common_divisor_or_multiple(rng: Random) -> Question:
    factor = rng.randint(2, 15)
    small, large = sorted(factor * n for n in rng.sample(range(2, 16), 2))
    steps, a, b = [], large, small
    while b:
        steps.append(f"Divide {a} by {b}: {a} - {a // b} * {b} = {a % b} remains.")
        a, b = b, a % b
    assert a == math.gcd(small, large)
    steps.append(f"The last number before 0 is {a}, so the greatest common divisor is {a}.")
    if rng.random() < 0.5:
        text = f"What is the greatest common divisor of {small} and {large}?"
        return Question(text, str(a), steps)
    least = small * large // a
    steps.append(f"Then the least common multiple is {small} * {large} / {a} = {least}.")
    return Question(f"What is the least common multiple of {small} and {large}?", str(least), steps)


def average(rng: Random) -> Question:
    num = rng.choice((4, 5))
    values = [rng.randint(5, 95) for _ in range(num)]
    values[-1] += -sum(values) % num
    total = sum(values)
    steps = (
        f"First, the sum is {' + '.join(map(str, values))} = {total}.",
        f"Then divide by {num}: {total} / {num} = {total // num}.",
    )
    text = f"What is the average of {', '.join(map(str, values))}?"
    return Question(text, str(total // num), steps, tuple(sorted(values)))


# ---- hard ----


def equation_with_x_on_both_sides(rng: Random) -> Question:
    c, x = rng.randint(2, 12), rng.choice([n for n in range(-15, 26) if n])
    a, b = c + rng.randint(2, 12), rng.choice([n for n in range(-40, 41) if n])
    d = (a - c) * x + b
    steps = (
        f"First collect x on the left: {a} - {c} = {a - c}, which leaves {a - c}x {signed(b)} = {d}.",
        f"Then bring {abs(b)} to the right: {a - c}x = {d} {signed(-b)} = {d - b}.",
        f"Finally divide by {a - c}: x = {d - b} / {a - c} = {x}.",
    )
    right = f"{c}x {signed(d)}" if d else f"{c}x"
    return Question(f"Solve for x: {a}x {signed(b)} = {right}.", str(x), steps)


def tickets(rng: Random) -> Question:
    child, adults, children = rng.randint(3, 12), rng.randint(5, 60), rng.randint(5, 60)
    adult, num = child + rng.randint(2, 10), adults + children
    total, extra = adult * adults + child * children, adult - child
    place = rng.choice(("A cinema", "A museum", "A theater", "A zoo", "A circus"))
    text = (
        f"{place} sells adult tickets at ${adult} and child tickets at ${child}. One day it sells {num} tickets for "
        f"${total} in total. How many adult tickets does it sell?"
    )
    steps = (
        f"First suppose that all are child tickets: {num} * {child} = {num * child} dollars.",
        f"Then {total} - {num * child} = {total - num * child} dollars are missing.",
        f"Each adult ticket brings {adult} - {child} = {extra} dollars more.",
        f"Therefore there are {total - num * child} / {extra} = {adults} adult tickets.",
    )
    return Question(text, str(adults), steps, (adult, child, num, total))


def sum_of_primes(rng: Random) -> Question:
    low = rng.randint(10, 250)
    high = low + rng.randint(12, 30)
    primes = [n for n in range(low, high + 1) if all(n % d for d in range(2, math.isqrt(n) + 1))]
    steps = [f"First, the prime numbers from {low} to {high} are {', '.join(map(str, primes)) or 'none'}."]
    if len(primes) > 1:
        steps.append(f"Then add them: {' + '.join(map(str, primes))} = {sum(primes)}.")
    text = f"What is the sum of all prime numbers from {low} to {high}, both included?"
    return Question(text, str(sum(primes)), steps)


def remainder_of_power(rng: Random) -> Question:
    modulus, exponent = rng.randint(5, 29), rng.randint(3, 8)
    base = rng.choice([n for n in range(2, 30) if n % modulus > 1])
    rest = base % modulus
    steps = [f"First, {base} divided by {modulus} leaves {rest}."]
    for power in range(2, exponent + 1):
        product = rest * base
        steps.append(f"For power {power}: {rest} * {base} = {product}, which leaves {product % modulus}.")
        rest = product % modulus
    assert rest == pow(base, exponent, modulus)
    text = f"What is the remainder when {base}^{exponent} is divided by {modulus}?"
    return Question(text, str(rest), steps)


def up_then_down(rng: Random) -> Question:
    price, up, down = 100 * rng.randint(1, 40), 5 * rng.randint(1, 12), 5 * rng.randint(1, 12)
    higher = Fraction(price * (100 + up), 100)
    final = higher * (100 - down) / 100
    text = (
        f"A price of ${price} rises by {up}% and then falls by {down}% of the new price. "
        "How many dollars is it in the end?"
    )
    steps = (
        f"First, it rises to {price} * {100 + up} / 100 = {exact(higher)} dollars.",
        f"Then {100 - down}% of that is left: {exact(higher)} * {100 - down} / 100 = {exact(final)} dollars.",
    )
    return Question(text, exact(final), steps)


TEMPLATES = {
    "easy": (addition, subtraction, percentage, change, one_step_equation),
    "medium": (order_of_operations, discount, linear_equation, common_divisor_or_multiple, average),
    "hard": (equation_with_x_on_both_sides, tickets, sum_of_primes, remainder_of_power, up_then_down),
}
