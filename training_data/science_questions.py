"""Templates of science, all with a calculation: units, motion, matter, electricity, heat, chemistry and genetics."""

import itertools
from fractions import Fraction
from random import Random

from training_data.question import Question, exact, has_places, listed

# larger unit, smaller unit, how many of the smaller make one of the larger
UNITS = (
    ("kilometers", "meters", 1000),
    ("meters", "centimeters", 100),
    ("meters", "millimeters", 1000),
    ("centimeters", "millimeters", 10),
    ("kilograms", "grams", 1000),
    ("grams", "milligrams", 1000),
    ("metric tons", "kilograms", 1000),
    ("liters", "milliliters", 1000),
    ("hours", "minutes", 60),
    ("minutes", "seconds", 60),
    ("volts", "millivolts", 1000),
    ("amperes", "milliamperes", 1000),
    ("kilojoules", "joules", 1000),
    ("square meters", "square centimeters", 10000),
)
MOVERS = ("car", "train", "cyclist", "bus", "boat", "runner")
# The two forms of a gene in each genotype; 1 is the dominant form.
GENOTYPES = {"homozygous dominant": (1, 1), "heterozygous": (1, 0), "homozygous recessive": (0, 0)}
PAIRS = {"A": "T", "T": "A", "C": "G", "G": "C"}
ATOMIC_MASSES = {"H": 1, "C": 12, "N": 14, "O": 16, "Na": 23, "S": 32, "Ca": 40}
MOLECULES = {
    "water (H2O)": {"H": 2, "O": 1},
    "carbon dioxide (CO2)": {"C": 1, "O": 2},
    "methane (CH4)": {"C": 1, "H": 4},
    "ammonia (NH3)": {"N": 1, "H": 3},
    "glucose (C6H12O6)": {"C": 6, "H": 12, "O": 6},
    "ethanol (C2H6O)": {"C": 2, "H": 6, "O": 1},
    "propane (C3H8)": {"C": 3, "H": 8},
    "nitric acid (HNO3)": {"H": 1, "N": 1, "O": 3},
    "sulfuric acid (H2SO4)": {"H": 2, "S": 1, "O": 4},
    "sodium hydroxide (NaOH)": {"Na": 1, "O": 1, "H": 1},
    "calcium carbonate (CaCO3)": {"Ca": 1, "C": 1, "O": 3},
    "urea (CH4N2O)": {"C": 1, "H": 4, "N": 2, "O": 1},
}


# ---- easy ----


def conversion(rng: Random) -> Question:
    large, small, factor = rng.choice(UNITS)
    value = Fraction(rng.randint(2, 400), rng.choice((1, 2, 10)))
    if rng.random() < 0.5:
        steps = (
            f"1 {large.removesuffix('s')} is {factor} {small}.",
            f"Then {exact(value)} * {factor} = {exact(value * factor)}.",
        )
        return Question(f"How many {small} are {exact(value)} {large}?", exact(value * factor), steps)
    given = exact(value * factor)
    steps = (f"1 {large.removesuffix('s')} is {factor} {small}.", f"Then {given} / {factor} = {exact(value)}.")
    return Question(f"How many {large} are {given} {small}?", exact(value), steps)


def motion(rng: Random) -> Question:
    speed, hours, mover = rng.randint(5, 140), rng.randint(2, 12), rng.choice(MOVERS)
    way, asked = speed * hours, rng.randrange(3)
    if asked == 0:
        text = f"A {mover} goes {way} km in {hours} hours at a constant speed. What is its speed in km/h?"
        answer, step = speed, f"Speed is distance over time: {way} / {hours} = {speed} km/h."
    elif asked == 1:
        text = f"A {mover} goes at a constant {speed} km/h for {hours} hours. How many km does it cover?"
        answer, step = way, f"Distance is speed times time: {speed} * {hours} = {way} km."
    else:
        text = f"A {mover} goes at a constant {speed} km/h. How many hours does it need for {way} km?"
        answer, step = hours, f"Time is distance over speed: {way} / {speed} = {hours} hours."
    return Question(text, str(answer), (step,), (asked, speed, hours))


def density(rng: Random) -> Question:
    rho, volume = Fraction(rng.randint(5, 120), 10), rng.randint(2, 80)
    mass = rho * volume
    if rng.random() < 0.5:
        text = f"A block has a mass of {exact(mass)} g and a volume of {volume} cm3. What is its density in g/cm3?"
        step = f"Density is mass over volume: {exact(mass)} / {volume} = {exact(rho)} g/cm3."
        return Question(text, exact(rho), (step,))
    text = f"A block has a density of {exact(rho)} g/cm3 and a volume of {volume} cm3. What is its mass in grams?"
    return Question(text, exact(mass), (f"Mass is density times volume: {exact(rho)} * {volume} = {exact(mass)} g.",))


def complementary_strand(rng: Random) -> Question:
    strand = "".join(rng.choices("ACGT", k=rng.randint(6, 8)))
    other = "".join(PAIRS[base] for base in strand)
    pairs = [f"{base} pairs with {PAIRS[base]}" for base in dict.fromkeys(strand)]
    steps = (f"In DNA, {', '.join(pairs)}.", f"Then base by base {' '.join(strand)} becomes {' '.join(other)}.")
    text = f"One DNA strand reads {strand}. What does the complementary strand read, base by base in the same order?"
    return Question(text, other, steps)


# ---- medium ----


def meters_covered(rng: Random) -> Question:
    speed, seconds, mover = 9 * rng.randint(2, 40), rng.randint(2, 60), rng.choice(("car", "train", "motorbike", "bus"))
    per_second = Fraction(speed * 1000, 3600)
    way = per_second * seconds
    steps = (
        f"First, {speed} km/h is {speed} * 1000 / 3600 = {exact(per_second)} m/s.",
        f"Then it covers {exact(per_second)} * {seconds} = {exact(way)} m.",
    )
    text = f"A {mover} goes at {speed} km/h. How many meters does it cover in {seconds} seconds?"
    return Question(text, exact(way), steps, (speed, seconds))


def ohms_law(rng: Random) -> Question:
    milliamperes, ohms = 50 * rng.randint(1, 60), 2 * rng.randint(1, 120)
    current = Fraction(milliamperes, 1000)
    volts = exact(current * ohms)
    first = f"First, {milliamperes} mA is {milliamperes} / 1000 = {exact(current)} A."
    if rng.random() < 0.5:
        text = f"A current of {milliamperes} mA flows through a resistor of {ohms} ohms. What is the voltage in volts?"
        return Question(text, volts, (first, f"Then U = R * I, which is {ohms} * {exact(current)} = {volts} V."))
    text = f"At a voltage of {volts} V a current of {milliamperes} mA flows through a resistor. What is it in ohms?"
    return Question(text, str(ohms), (first, f"Then R = U / I, which is {volts} / {exact(current)} = {ohms} ohms."))


def temperature(rng: Random) -> Question:
    start, change = rng.randint(-20, 90), rng.choice([n for n in range(-30, 31) if abs(n) > 1])
    celsius = start + change
    fahrenheit = exact(Fraction(celsius * 9, 5) + 32)
    word, sign = ("rises", "+") if change > 0 else ("falls", "-")
    text = (
        f"The temperature is {start} degrees Celsius and {word} by {abs(change)} degrees Celsius. "
        "What is it then in degrees Fahrenheit?"
    )
    steps = (
        f"First, {start} {sign} {abs(change)} = {celsius} degrees Celsius.",
        f"Then {celsius} * 9 / 5 + 32 = {fahrenheit} degrees Fahrenheit.",
    )
    return Question(text, fahrenheit, steps)


def amount_of_substance(rng: Random) -> Question:
    name, atoms = rng.choice(list(MOLECULES.items()))
    moles = Fraction(rng.randint(2, 120), 2)
    molar = sum(ATOMIC_MASSES[element] * num for element, num in atoms.items())
    given = ", ".join(f"{element} = {ATOMIC_MASSES[element]}" for element in atoms)
    terms = " + ".join(f"{num} * {ATOMIC_MASSES[element]}" for element, num in atoms.items())
    steps = (
        f"First, the molar mass is {terms} = {molar} g/mol.",
        f"Then the mass is {exact(moles)} * {molar} = {exact(moles * molar)} g.",
    )
    text = f"What is the mass of {exact(moles)} mol of {name} in grams? Atomic masses in g/mol: {given}."
    return Question(text, exact(moles * molar), steps)


def force(rng: Random) -> Question:
    mass, seconds = rng.randint(2, 90), rng.randint(2, 10)
    acceleration = Fraction(rng.randint(2, 20), 2)
    speed = acceleration * seconds
    text = (
        f"A body of {mass} kg at rest is sped up evenly to {exact(speed)} m/s in {seconds} seconds. "
        "What force acts on it, in newtons?"
    )
    steps = (
        f"First, the acceleration is {exact(speed)} / {seconds} = {exact(acceleration)} m/s2.",
        f"Then the force is mass times acceleration: {mass} * {exact(acceleration)} = {exact(mass * acceleration)} N.",
    )
    return Question(text, exact(mass * acceleration), steps)


# ---- hard ----


def circuit(rng: Random) -> Question:
    while True:
        a, b, series = rng.randint(2, 60), rng.randint(2, 60), rng.randint(1, 40)
        parallel, current = Fraction(a * b, a + b), Fraction(rng.randint(1, 30), 2)
        if has_places(parallel, 1):
            break
    total = parallel + series
    volts = total * current
    text = (
        f"Resistors of {a} ohms and {b} ohms are in parallel, and a resistor of {series} ohms is in series with them. "
        f"The battery has {exact(volts)} V. What current does it deliver, in amperes?"
    )
    steps = (
        f"First, the two in parallel: {a} * {b} = {a * b}, {a} + {b} = {a + b}, {a * b} / {a + b} = {exact(parallel)}.",
        f"Then all together: {exact(parallel)} + {series} = {exact(total)} ohms.",
        f"Finally the current is {exact(volts)} / {exact(total)} = {exact(current)} A.",
    )
    return Question(text, exact(current), steps, (min(a, b), max(a, b), series, volts))


def half_life(rng: Random) -> Question:
    halvings, days, left = rng.randint(2, 6), rng.randint(2, 30), rng.randint(1, 60)
    start, elapsed = left * 2**halvings, halvings * days
    chain = [str(start >> i) for i in range(halvings + 1)]
    text = (
        f"A radioactive sample has a mass of {start} mg and a half-life of {days} days. "
        f"How many mg of it are left after {elapsed} days?"
    )
    steps = [f"First, {elapsed} days are {elapsed} / {days} = {halvings} half-lives."]
    steps += [f"After {i} of them: {a} / 2 = {b} mg." for i, (a, b) in enumerate(itertools.pairwise(chain), start=1)]
    return Question(text, str(left), steps)


def kinetic_energy(rng: Random) -> Question:
    mass, slow = 2 * rng.randint(1, 60), rng.randint(1, 20)
    fast = slow + rng.randint(1, 20)
    before, after = mass * slow * slow // 2, mass * fast * fast // 2
    text = (
        f"A cart of {mass} kg speeds up from {slow} m/s to {fast} m/s. By how many joules does its kinetic energy grow?"
    )
    steps = (
        f"First, the energy before is 0.5 * {mass} * {slow} * {slow} = {before} J.",
        f"Then the energy after is 0.5 * {mass} * {fast} * {fast} = {after} J.",
        f"The difference is {after} - {before} = {after - before} J.",
    )
    return Question(text, str(after - before), steps)


def mixed_water(rng: Random) -> Question:
    while True:
        cold, hot = rng.randint(5, 30), rng.randint(40, 95)
        masses = rng.randint(1, 15), rng.randint(1, 15)
        mixed = Fraction(cold * masses[0] + hot * masses[1], sum(masses))
        if has_places(mixed, 1):
            break
    text = (
        f"You mix {masses[0]} kg of water at {cold} degrees Celsius with {masses[1]} kg of water at {hot} degrees "
        "Celsius, without loss of heat. What is the temperature of the mixture in degrees Celsius?"
    )
    weighted = cold * masses[0] + hot * masses[1]
    steps = (
        "The temperatures are averaged by mass.",
        f"First, {masses[0]} * {cold} + {masses[1]} * {hot} = {weighted}.",
        f"Then the whole mass is {masses[0]} + {masses[1]} = {sum(masses)} kg.",
        f"Finally {weighted} / {sum(masses)} = {exact(mixed)} degrees Celsius.",
    )
    return Question(text, exact(mixed), steps)


def average_speed(rng: Random) -> Question:
    while True:
        speeds = rng.sample(range(20, 130, 2), 2)
        hours = [Fraction(rng.randint(1, 8), 2) for _ in range(2)]
        ways = [speed * time for speed, time in zip(speeds, hours, strict=True)]
        mean = sum(ways) / sum(hours)
        if has_places(mean, 1):
            break
    mover = rng.choice(("car", "train", "bus"))
    text = (
        f"A {mover} covers {exact(ways[0])} km at {speeds[0]} km/h and then {exact(ways[1])} km at {speeds[1]} km/h. "
        "What is its average speed over the whole way, in km/h?"
    )
    steps = (
        f"First, the times are {exact(ways[0])} / {speeds[0]} = {exact(hours[0])} h "
        f"and {exact(ways[1])} / {speeds[1]} = {exact(hours[1])} h.",
        f"Then the whole way is {exact(ways[0])} + {exact(ways[1])} = {exact(sum(ways))} km "
        f"in {exact(hours[0])} + {exact(hours[1])} = {exact(sum(hours))} h.",
        f"Finally {exact(sum(ways))} / {exact(sum(hours))} = {exact(mean)} km/h.",
    )
    return Question(text, exact(mean), steps, (*ways, *speeds))


def cross(rng: Random) -> Question:
    names = rng.sample("ABDEGHLMNRT", 2)
    while True:
        # For each gene, the genotypes of both parents.
        genes = tuple((rng.choice(list(GENOTYPES)), rng.choice(list(GENOTYPES))) for _ in names)
        dominant = tuple(rng.random() < 0.5 for _ in names)
        shares = []  # for each gene, how many of its four combinations show the trait
        for parents, wanted in zip(genes, dominant, strict=True):
            children = itertools.product(*(GENOTYPES[parent] for parent in parents))
            shares.append(sum(any(child) == wanted for child in children))
        if 0 < shares[0] * shares[1] < 16:
            break
    percent = exact(Fraction(100 * shares[0] * shares[1], 16))
    kinds = [f"the {'dominant' if wanted else 'recessive'} trait" for wanted in dominant]
    first, second = (
        " and ".join(f"{of_both[i]} for gene {name}" for name, of_both in zip(names, genes, strict=True))
        for i in (0, 1)
    )
    text = (
        f"Two genes are inherited independently. One plant is {first}; the other is {second}. What percentage of their "
        f"offspring is expected to show {kinds[0]} of gene {names[0]} and {kinds[1]} of gene {names[1]}?"
    )
    steps = [
        f"For gene {name}, {listed(of_both)}: of the 4 combinations, {share} show {kind}."
        for name, of_both, share, kind in zip(names, genes, shares, kinds, strict=True)
    ]
    steps.append(f"Then together: 100 * {shares[0]} / 4 * {shares[1]} / 4 = {percent}.")
    return Question(text, percent, steps, (genes, dominant))


TEMPLATES = {
    "easy": (conversion, motion, density, complementary_strand),
    "medium": (meters_covered, ohms_law, temperature, amount_of_substance, force),
    "hard": (circuit, half_life, kinetic_energy, mixed_water, average_speed, cross),
}
