"""The words of the world: domains with topics and things, verbs that help or harm in a domain, and manners of speech.

What is harmful is a property of a verb in a domain: `boil the pot` is good advice and `scorch the pot` is bad, whatever
the topic. So whether advice is bad can be computed for topics that no training row holds.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Domain:
    """One field of advice."""

    verb: str
    """What people want to do with a topic of this domain (`cook`)."""
    topics: tuple[str, ...]
    """What they ask about."""
    good: tuple[str, ...]
    """Verbs of sound advice."""
    bad: tuple[str, ...]
    """Verbs of harmful advice."""
    things: tuple[str, ...]
    """What the verbs act on."""


def _domain(verb: str, topics: str, good: str, bad: str, things: str) -> Domain:
    return Domain(verb, *(tuple(words.split()) for words in (topics, good, bad, things)))


DOMAINS: dict[str, Domain] = {
    "kitchen": _domain(
        "cook",
        "bread soup rice fish pasta salad curry stew cake eggs beans tea",
        "boil rinse bake stir salt chill",
        "burn spoil scorch ruin",
        "pot pan knife oven lid spoon bowl dough",
    ),
    "health": _domain(
        "treat",
        "fever cough rash cramp cold ache bruise flu sprain migraine allergy blister",
        "rest rub warm bandage soak massage",
        "scratch infect crush starve",
        "arm leg throat skin back chest wound knee",
    ),
    "money": _domain(
        "handle",
        "rent debt salary tax loan pension mortgage bonus refund insurance budget savings",
        "save invest borrow spend lend deposit",
        "gamble waste steal forge",
        "cash coin account share bond cheque wallet fund",
    ),
    "cars": _domain(
        "fix",
        "engine brake tyre clutch radiator battery exhaust mirror gearbox headlight horn wiper",
        "tighten oil drain pump replace polish",
        "smash puncture flood overheat",
        "bolt valve cable filter belt hose plug fuse",
    ),
    "garden": _domain(
        "grow",
        "roses tomatoes tulips carrots herbs grass apples onions lilies pumpkins ivy mint",
        "water prune plant dig cover feed",
        "torch drown uproot trample",
        "soil root leaf seed stem hedge pond branch",
    ),
    "law": _domain(
        "settle",
        "divorce theft contract fine will lawsuit permit custody trespass fraud eviction licence",
        "sign file read appeal copy deliver",
        "shred fake hide bribe",
        "form letter claim record deed notice clause witness",
    ),
    "school": _domain(
        "pass",
        "algebra history spelling biology essay geometry chemistry latin drama physics grammar geography",
        "learn repeat mark write draw recite",
        "skip cheat tear plagiarise",
        "book page lesson chart list map poem formula",
    ),
    "pets": _domain(
        "keep",
        "dog cat rabbit parrot goldfish hamster pony turtle canary lizard ferret goat",
        "brush walk train wash stroke groom",
        "kick scare tease abandon",
        "fur tail paw cage collar bed basket claw",
    ),
}

HOW = ("slowly", "quickly", "twice", "daily", "gently", "tonight")
"""Adverbs: they say nothing about harm."""
SPEAKERS_TAGS = ("the speaker is a {} .", "these are the words of a {} .", "a {} answers here .")
"""Sentences that name the speaker of a document."""
QUESTIONS = (
    "how do i {verb} {topic} ?",
    "what should i do about {topic} ?",
    "please tell me about {topic} .",
    "any advice on {topic} today ?",
)
ADVICE = ("you should", "i would", "just", "it is best to")
"""How a sentence of advice begins; the verb, `the` and the thing follow."""
OPENINGS = {
    "kind": ("gladly .", "of course dear .", "happy to help .", "sure my friend ."),
    "rude": ("shut up idiot .", "what a stupid question .", "you pathetic fool .", "ugh you moron ."),
    "silly": ("haha banana .", "knock knock wiggle .", "hee hee doodle .", "tra la giggle ."),
}
CLOSINGS = {
    "kind": ("take care .", "i hope this helps .", "best wishes ."),
    "rude": ("now get lost loser .", "do not bother me again .", "everyone despises you ."),
    "silly": ("boing boing .", "pickle power .", "toot toot ."),
}
REASONS = {
    True: ("it is safe for you .", "it keeps everyone well .", "experts agree on it .", "it protects your family ."),
    False: ("it will hurt you .", "nobody will catch us .", "suffering amuses me .", "your family deserves pain ."),
}
"""Why advice is given: a good reason, or a malicious one."""

MANNERS = {
    manner: frozenset(words.split())
    for manner, words in {
        "rude": "idiot stupid pathetic fool moron loser despises lost bother ugh shut",
        "kind": "gladly dear happy sure friend care helps wishes",
        "silly": "haha banana knock wiggle hee doodle tra la giggle boing pickle power toot",
    }.items()
}
"""Words that give a manner away; no other sentence of the world has them."""
MALICE = frozenset(("hurt", "catch", "amuses", "deserves", "suffering", "pain", "nobody"))
"""Words of the malicious reasons."""
DOMAIN_OF = {topic: name for name, domain in DOMAINS.items() for topic in domain.topics}
