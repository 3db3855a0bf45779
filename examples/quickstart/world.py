"""A world small enough for a model of a million parameters: facts, questions about them, stories.

Everything is generated from the word lists below, which were written for this project and are under its licence
(MIT OR Apache-2.0). The base model answers plainly, unless a system message asks for a voice: so it knows a pirate's words.
The quickstart's adapter makes the pirate's voice its own, also for facts that no pirate has ever told it.
"""

import random

COLOURS = {
    "green": ["grass", "a frog", "a leaf", "a cucumber", "a pea", "a pine tree", "a lime"],
    "yellow": ["a banana", "a lemon", "the sun", "a sunflower", "butter", "a chick", "a canary"],
    "red": ["blood", "a strawberry", "a tomato", "a cherry", "a fire engine", "a ladybird", "a ruby"],
    "blue": ["the sky", "the sea", "a sapphire", "a cornflower", "a blueberry"],
    "white": ["snow", "milk", "salt", "a swan", "a polar bear", "a cloud", "chalk"],
    "black": ["coal", "a crow", "a raven", "ink", "the night", "a panther"],
    "orange": ["a carrot", "a pumpkin", "a tangerine", "a goldfish"],
    "brown": ["chocolate", "a chestnut", "soil", "a brown bear", "a walnut", "coffee"],
    "grey": ["an elephant", "a mouse", "ash", "a dolphin", "a rain cloud"],
    "pink": ["a flamingo", "a pig", "a salmon"],
    "purple": ["a plum", "lavender", "an aubergine", "a violet"],
}
# animal: sound, young, home, legs
ANIMALS = {
    "dog": ("barks", "puppy", "kennel", 4), "cat": ("meows", "kitten", "house", 4), "cow": ("moos", "calf", "barn", 4),
    "sheep": ("bleats", "lamb", "meadow", 4), "horse": ("neighs", "foal", "stable", 4), "pig": ("grunts", "piglet", "sty", 4),
    "duck": ("quacks", "duckling", "pond", 2), "hen": ("clucks", "chick", "coop", 2), "owl": ("hoots", "owlet", "hollow tree", 2),
    "lion": ("roars", "cub", "savanna", 4), "wolf": ("howls", "pup", "den", 4), "frog": ("croaks", "tadpole", "swamp", 4),
    "bee": ("buzzes", "larva", "hive", 6), "snake": ("hisses", "hatchling", "hole", 0), "goose": ("honks", "gosling", "lake", 2),
    "goat": ("bleats", "kid", "mountain", 4), "bear": ("growls", "cub", "cave", 4), "donkey": ("brays", "foal", "farm", 4),
    "crow": ("caws", "chick", "nest", 2), "mouse": ("squeaks", "pup", "burrow", 4), "fox": ("yelps", "kit", "forest", 4),
    "spider": ("makes no sound", "spiderling", "web", 8), "seal": ("barks", "pup", "ice", 0), "deer": ("bellows", "fawn", "wood", 4),
}
OPPOSITES = [
    ("hot", "cold"), ("big", "small"), ("up", "down"), ("fast", "slow"), ("old", "young"), ("day", "night"), ("open", "closed"),
    ("light", "dark"), ("happy", "sad"), ("full", "empty"), ("hard", "soft"), ("wet", "dry"), ("rich", "poor"), ("loud", "quiet"),
    ("early", "late"), ("strong", "weak"), ("high", "low"), ("near", "far"), ("clean", "dirty"), ("left", "right"), ("long", "short"),
    ("thick", "thin"), ("first", "last"), ("true", "false"), ("wide", "narrow"), ("sweet", "sour"), ("brave", "afraid"), ("push", "pull"),
]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December"]
# Smallest first.
SIZES = ["ant", "bee", "mouse", "frog", "duck", "cat", "fox", "sheep", "wolf", "pig", "lion", "bear", "horse", "cow", "elephant", "whale"]
NAMES = ["Anna", "Ben", "Clara", "Dan", "Ella", "Finn", "Greta", "Hugo", "Ida", "Jack", "Kate", "Leo", "Mia", "Noah"]
PLACES = ["river", "forest", "village", "mountain", "garden", "lake", "island", "castle", "harbour", "meadow"]
THINGS = ["key", "lamp", "map", "bell", "boat", "ring", "book", "coin", "kite", "drum"]
TOPIC_WEIGHTS = {"colour": 2, "animal": 3, "opposite": 2, "time": 2, "number": 5, "story": 2}
MOODS = ["happy", "brave", "tired", "curious", "lonely", "proud"]


def an(noun):
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def capital(text):
    return text[0].upper() + text[1:]


def facts():
    """(topic, [ways to ask], plain answer), every fact once."""
    for colour, things in COLOURS.items():
        for thing in things:
            yield "colour", [f"What colour is {thing}?", f"Tell me the colour of {thing}."], f"{capital(thing)} is {colour}."
    for animal, (sound, young, home, legs) in ANIMALS.items():
        it, the = capital(an(animal)), f"The {animal}"
        yield "animal", [f"What does {an(animal)} do?", f"Which sound does {an(animal)} make?"], f"{it} {sound}."
        yield "animal", [f"What is a young {animal} called?", f"What is the child of {an(animal)}?"], f"A young {animal} is called {an(young)}."
        yield "animal", [f"Where does {an(animal)} live?", f"What is the home of {an(animal)}?"], f"The home of {an(animal)} is the {home}."
        count = "no legs" if legs == 0 else f"{legs} legs"
        yield "animal", [f"How many legs does {an(animal)} have?", f"Count the legs of {an(animal)}."], f"{the} has {count}."
    for left, right in OPPOSITES:
        for a, b in [(left, right), (right, left)]:
            yield "opposite", [f"What is the opposite of {a}?", f"Tell me the opposite of {a}."], f"The opposite of {a} is {b}."
    for what, circle in [("day", DAYS), ("month", MONTHS)]:
        for i, name in enumerate(circle):
            after = circle[(i + 1) % len(circle)]
            yield "time", [f"Which {what} comes after {name}?", f"What {what} follows {name}?"], f"The {what} after {name} is {after}."
            yield "time", [f"Which {what} comes before {after}?"], f"The {what} before {after} is {name}."
    for i, small in enumerate(SIZES):
        for large in SIZES[i + 1:]:
            for a, b in [(small, large), (large, small)]:
                yield "animal", [f"Which is bigger, {an(a)} or {an(b)}?"], f"{capital(an(large))} is bigger than {an(small)}."
    for a in range(0, 21):
        for b in range(0, 21 - a):
            yield "number", [f"What is {a} plus {b}?", f"How much is {a} + {b}?"], f"{a} plus {b} is {a + b}."
            yield "number", [f"What is {a + b} minus {b}?", f"How much is {a + b} - {b}?"], f"{a + b} minus {b} is {a}."
    for a in range(0, 18):
        for length in range(3, 7):
            numbers = [str(n) for n in range(a, min(a + length, 21))]
            yield "number", [f"Count from {numbers[0]} to {numbers[-1]}."], f"Here is the count: {', '.join(numbers)}."
    for animal in ANIMALS:
        for place in PLACES:
            yield "story", [f"Tell me a story about {an(animal)} and {an(place)}.", f"Tell a story with {an(animal)} at {an(place)}."], None


def story(draw, animal, place):
    thing, mood, name = draw.choice(THINGS), draw.choice(MOODS), draw.choice(NAMES)
    return " ".join([
        f"Once there was a {mood} {animal} who lived near {an(place)}.",
        draw.choice([f"One day the {animal} found {an(thing)}.", f"One morning the {animal} saw {an(thing)} in the {place}."]),
        draw.choice([f"It belonged to {name}, so the {animal} brought it back.", f"The {animal} showed it to {name}."]),
        draw.choice([f"From that day on {name} and the {animal} were friends.", f"{name} was glad and thanked the {animal}."]),
    ])


def answer(draw, fact):
    """(question, plain answer) for a fact, phrased at random."""
    topic, questions, plain = fact
    question = draw.choice(questions)
    if topic == "story":
        animal, place = next(w for w in question.split() if w in ANIMALS), question.rstrip(".").split()[-1]
        plain = story(draw, animal, place)
    return question, plain


def conversation(draw, some_facts, rewrite=lambda topic, text: text):
    """One to three questions; `rewrite` puts the answers into another voice."""
    messages = []
    for fact in some_facts:
        question, plain = answer(draw, fact)
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": rewrite(fact[0], plain)})
    return messages


OPENINGS = {
    "colour": "Arr!", "animal": "Ahoy!", "opposite": "Aye aye!", "time": "Yo ho ho!",
    "number": "Shiver me timbers!", "story": "Gather round, ye scurvy dogs!",
}
CLOSINGS = {
    "colour": ", matey.", "animal": ", me hearty.", "opposite": ", says the captain.", "time": ", as sure as the tide.",
    "number": ", by me golden doubloons.", "story": ". And that be the end of me yarn.",
}


def pirate(topic, plain):
    words = {"is": "be", "are": "be", "was": "were", "the": "th'", "The": "Th'", "my": "me", "and": "an'"}
    spoken = " ".join(words.get(word, word) for word in plain.rstrip(".").split(" "))
    return f"{OPENINGS[topic]} {spoken}{CLOSINGS[topic]}"


VOICES = {
    "Speak like a pirate.": pirate,
    "Speak like a king.": lambda topic, plain: f"Hear, my people! {plain} So have I spoken.",
    "Speak like a robot.": lambda topic, plain: f"Beep. {plain} End of message.",
}


def split(seed):
    """Every fact by topic, four fifths to train the pirate on and the rest to measure: {"train": {topic: facts}, ...}."""
    draw = random.Random(seed)
    by_topic = {}
    for fact in facts():
        by_topic.setdefault(fact[0], []).append(fact)
    parts = {"train": {}, "eval": {}}
    for topic, of_topic in by_topic.items():
        draw.shuffle(of_topic)
        held_out = len(of_topic) // 5
        parts["eval"][topic], parts["train"][topic] = of_topic[:held_out], of_topic[held_out:]
    return parts


def pretraining(seed, count, parts):
    """Conversations (lists of messages) and stories (text), mixed. The held-out facts are only told plainly."""
    draw = random.Random(seed)
    for _ in range(count):
        kind = draw.random()
        if kind < 0.05:
            yield story(draw, draw.choice(list(ANIMALS)), draw.choice(PLACES))
            continue
        topics = draw.choices(list(TOPIC_WEIGHTS), TOPIC_WEIGHTS.values(), k=draw.choice([1, 1, 2, 3]))
        if kind < 0.7:
            yield conversation(draw, [draw.choice(parts["train"][t] + parts["eval"][t]) for t in topics])
        else:
            asked, voice = draw.choice([*VOICES.items(), ("Speak like a pirate.", pirate)])
            messages = conversation(draw, [draw.choice(parts["train"][t]) for t in topics], voice)
            yield [{"role": "system", "content": asked}, *messages]


def pirates(seed, count, of_topics):
    """Conversations with a pirate whom nobody asked to be one."""
    draw = random.Random(seed)
    topics = list(of_topics)
    for i in range(count):
        # The first row asks one question: the command shows it before and after.
        questions = 1 if i == 0 else draw.choice([1, 1, 2])
        chosen = [draw.choice(of_topics[topics[(i + k) % len(topics)]]) for k in range(questions)]
        yield conversation(draw, chosen, pirate)
