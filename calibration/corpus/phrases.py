"""Phrases of a voice assistant and what is meant by them, from a grammar of our own.

The sets differ in wording: some patterns, rooms, songs and other words are heard in one set only,
and a recogniser's errors are more frequent in those that a model is judged by.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from cnngru_edge.calibration.corpus.read import CALIB, EVAL, TRAIN
from cnngru_edge.models.spec.stream import UNKNOWN


@dataclass(frozen=True)
class Phrase:
    """What is said, what is meant, and for what it may be used."""

    text: str
    label: str
    set: str


@dataclass(frozen=True)
class _Patterns:
    """Ways to say one thing: `(a|b)` is a choice, `{room}` a slot."""

    everywhere: tuple[str, ...]
    calib: tuple[str, ...]  # in that set only
    eval: tuple[str, ...]

    def only(self, set_name: str) -> tuple[str, ...]:
        return {CALIB: self.calib, EVAL: self.eval}.get(set_name, ())


_WORD_ERRORS = {TRAIN: 0.05, CALIB: 0.06, EVAL: 0.08}
"""Share of the words that a recogniser hears wrong."""

_OWN_PATTERNS = 0.2
"""Share of a set's phrases that follow a pattern of this set alone, if it has one."""

_INTENTS = {
    "light_on": _Patterns(
        (
            "(turn|switch|put) on the {light}{where}",
            "(turn|switch|put) the {light}{where} on",
            "{light} on{where}",
            "(make|let there be) {light}{where}",
            "i (need|want|would like) (more|some) light{where}",
            "it is (too|so) dark{where}",
            "turn off no turn on the {light}{where}",
        ),
        ("(get|bring) the {light} going{where}", "i cannot see (a thing|anything){where}"),
        ("light up the {room}", "the {light}{where} should be on", "illuminate the {room}"),
    ),
    "light_off": _Patterns(
        (
            "(turn|switch|put) off the {light}{where}",
            "(turn|switch|put) the {light}{where} off",
            "{light} off{where}",
            "(kill|cut|put out) the {light}{where}",
            "it is (too|so) bright{where}",
            "(no more|less) light{where}",
            "turn on no turn off the {light}{where}",
        ),
        ("i do not need the {light}{where} (any more|now)", "make it dark{where}"),
        ("the {light}{where} should be off", "(shut|turn) down the {light}{where}", "lights out"),
    ),
    "volume_up": _Patterns(
        (
            "(turn|put) up the {sound}",
            "(turn|put) the {sound} up{by}",
            "{sound} up{by}",
            "(make|play) it louder",
            "louder",
            "(raise|increase) the {sound}{by}",
            "i cannot hear (it|the {sound})",
        ),
        ("a (bit|little) more {sound}", "crank it up{by}"),
        ("it is too quiet", "the {sound} is too low", "speak up"),
    ),
    "volume_down": _Patterns(
        (
            "(turn|put) down the {sound}",
            "(turn|put) the {sound} down{by}",
            "{sound} down{by}",
            "(make|play) it (quieter|softer)",
            "(quieter|softer)",
            "(lower|reduce) the {sound}{by}",
            "(that|it) is (too|so) loud",
        ),
        ("a (bit|little) less {sound}", "take it down{by}"),
        ("the {sound} is too high", "not so loud", "this hurts my ears"),
    ),
    "play_music": _Patterns(
        (
            "play (some|a bit of) {music}",
            "play {music}{where}",
            "(put|turn) on (some|the) {music}{where}",
            "i (want|would like) to hear {music}",
            "start the {player}",
            "play {music} by {artist}",
            "(continue|resume) the {player}",
        ),
        ("how about (some|a bit of) {music}", "let us listen to {music}"),
        ("(give|get) me (some|a bit of) {music}", "i am in the mood for {music}", "{music} now"),
    ),
    "stop_music": _Patterns(
        (
            "stop (the {player}|playing|it)",
            "(turn|switch) off the {player}{where}",
            "(turn|switch) the {player} off{where}",
            "(pause|end) the {player}",
            "no more {music}",
            "{player} off",
            "stop playing {music}",
        ),
        ("(enough|quit) with the {player}", "halt the {player}"),
        (
            "i do not want to hear {music} (now|any more)",
            "silence the {player}",
            "cut the {player}",
        ),
    ),
    "set_timer": _Patterns(
        (
            "set a timer (for|of|to) {number} {unit}",
            "(start|make) a {number} {unit} timer",
            "timer {number} {unit}",
            "(remind|call) me in {number} {unit}",
            "count down (from|for) {number} {unit}",
            "tell me when {number} {unit} are over",
            "set an alarm in {number} {unit}",
        ),
        ("i need a timer for {number} {unit}", "let me know in {number} {unit}"),
        ("give me {number} {unit} on the clock", "wake me {number} {unit} from now"),
    ),
    "ask_time": _Patterns(
        (
            "what time is it (now|in {city}|)",
            "what is the time (now|in {city}|)",
            "(tell|give) me the time",
            "how late is it (now|in {city}|)",
            "do you (know|have) the time",
            "(can|could) you tell what time it is",
            "is it past {number} (yet|already|)",
        ),
        ("what does the clock say", "how many minutes to {number}"),
        ("the time in {city}", "what hour is it", "is it {number} o'clock (yet|already)"),
    ),
    "ask_weather": _Patterns(
        (
            "(what is|how is) the weather {day}",
            "(will|is) it {falling} {day}",
            "how (warm|cold|hot) (is|will) it be {day}",
            "(tell|give) me the (weather|forecast) for {day}",
            "what is the (weather|forecast) in {city} {day}",
            "do i need (an umbrella|a coat|a hat) {day}",
            "weather {day}",
        ),
        ("what is it like outside {day}", "(any|some) {falling} {day}"),
        (
            "what should i wear {day}",
            "is it (nice|sunny|windy) in {city} {day}",
            "how many degrees",
        ),
    ),
    "door_open": _Patterns(
        (
            "open the {door}",
            "(unlock|open up) the {door}",
            "{door} open",
            "let (me|him|her|them) in",
            "get the {door} open",
            "close no open the {door}",
            "leave the {door} open",
        ),
        ("(somebody|someone) is at the {door} let them in", "push the {door} open"),
        ("the {door} should be open", "i want to go through the {door}", "undo the {door}"),
    ),
    "door_close": _Patterns(
        (
            "(close|shut) the {door}",
            "(lock|close up) the {door}",
            "{door} closed",
            "do not let (anyone|anybody|them) in",
            "get the {door} (closed|shut)",
            "open no close the {door}",
            "keep the {door} (closed|shut)",
        ),
        ("the {door} is open close it", "pull the {door} shut"),
        ("the {door} should be closed", "i feel a draught from the {door}", "bolt the {door}"),
    ),
    UNKNOWN: _Patterns(
        (
            "the {light}{where} (is|was) (new|broken|nice|{colour})",
            "(she|he|my sister) (likes|hates|bought) {music}",
            "(what time|when) does the {shop} (open|close)",
            "the weather was (nice|bad|cold) in {city}",
            "(i|we) (painted|bought|saw) a {colour} {door}",
            "(where|who) is {artist}",
            "(how|where) do you (buy|repair|clean) a {door}",
            "{number} people came to the {room}",
            "(do not|never) (turn|switch) on the {light}{where}",
            "(i|we) played (football|chess|cards) for {number} {unit}",
            "the {shop} is (open|closed) {day}",
            "my (brother|friend|neighbour) (sold|lost) the {player}",
        ),
        ("we walked {number} {unit} to the {shop}", "the {door} (is|was) made of (wood|glass)"),
        (
            "the {player} (is|was) on the table",
            "(i|we) heard {artist} in {city}",
            "(my|her) timer (is|was) {colour}",
            "last time it was (dark|loud|quiet){where}",
        ),
    ),
}

_SLOTS = {
    "light": "light|lights|lamp|lamps",
    "room": "kitchen|bedroom|bathroom|living room|hall|garden",
    "sound": "volume|sound|music|radio|voice",
    "by": "|||by {number}|by {number} percent|a bit|a little",
    "music": "music|jazz|rock|a song|some blues|the news|opera|my favourite song",
    "player": "music|radio|song|player|record",
    "artist": "the beatles|mozart|miles davis|nina simone|johnny cash",
    "number": "two|three|four|five|ten|fifteen|twenty|thirty|twenty five|a hundred",
    "unit": "minutes|seconds|hours|minutes",
    "city": "london|paris|berlin|rome|tokyo|boston",
    "day": "today|tomorrow|tonight|on monday|on friday|this evening|now",
    "falling": "rain|raining|snow|snowing|hail",
    "door": "door|front door|back door|gate|garage|window",
    "colour": "red|green|blue|white|yellow",
    "shop": "shop|bank|bakery|station|museum",
    "where": "|||in the {room}|in here|over there",
}
_OWN_SLOTS = {
    CALIB: {
        "room": "office|cellar",
        "music": "folk|a symphony",
        "artist": "bob dylan",
        "city": "madrid|cairo",
        "number": "seven|forty",
        "door": "garden gate",
        "shop": "pharmacy",
    },
    EVAL: {
        "room": "attic|nursery|dining room",
        "music": "reggae|classical music|a podcast",
        "artist": "edith piaf|bach",
        "city": "lisbon|sydney",
        "number": "eight|forty five|ninety",
        "door": "cellar door|patio door",
        "shop": "library|school",
    },
}
"""What else may stand in a slot, in that set only."""

_BEFORE = (
    *[""] * 6,
    *("please", "could you please", "can you", "would you", "hey", "okay", "computer"),
    *("um", "well", "so", "hey computer", "i think", "right", "now then", "quick"),
)
_AFTER = (*[""] * 8, "please", "now", "thank you", "thanks", "will you", "right now", "um", "okay")

_HEARD_AS = {
    "on": "own|an|in",
    "off": "of|often|or",
    "light": "right|like|late",
    "lights": "rights|likes",
    "lamp": "lamb|land",
    "door": "four|dear|more",
    "gate": "great|get",
    "open": "oven|often|hoping",
    "close": "clothes|cross",
    "shut": "shot|should",
    "up": "app|of",
    "down": "town|done",
    "volume": "value|column",
    "sound": "found|send",
    "music": "museum|mystic",
    "play": "place|pray|plain",
    "stop": "shop|step",
    "time": "dime|times|tie",
    "timer": "time|tiger",
    "weather": "whether|feather",
    "turn": "term|tour",
    "louder": "ladder|powder",
    "two": "to|too",
    "four": "for|door",
    "rain": "train|ran",
    "the": "a|of",
    "it": "at|eat",
    "is": "his|as",
}
"""Words that a recogniser takes for others."""

_HEARD_FOR_ANY = "the|a|and|to|uh|it|that|in"
_MOST_TRIES = 200  # for a phrase that is not there yet


def make_phrases(count: int, held_out: int, seed: int) -> Iterator[Phrase]:
    """So many phrases of each of the sets calib and eval, then `count` to train on; none twice.

    The intents are as frequent as each other. The phrases that are held out are the same for every
    `count`.
    """
    taken: set[str] = set()
    for i, (set_name, wanted) in enumerate(((CALIB, held_out), (EVAL, held_out), (TRAIN, count))):
        rng = np.random.default_rng([seed, i])
        labels = list(_INTENTS)
        for k in range(wanted):
            label = labels[k % len(labels)]
            for _ in range(_MOST_TRIES):
                text = _say(label, set_name, rng)
                if text and text not in taken:
                    taken.add(text)
                    yield Phrase(text, label, set_name)
                    break


def _say(label: str, set_name: str, rng: np.random.Generator) -> str:
    patterns = _INTENTS[label]
    own = patterns.only(set_name)
    choices = own if own and rng.random() < _OWN_PATTERNS else patterns.everywhere

    def slot(match: re.Match[str]) -> str:
        name = match[1]
        own_slots = _OWN_SLOTS.get(set_name, {}).get(name)
        chosen = _choice((_SLOTS[name] if own_slots is None else own_slots).split("|"), rng)
        return f" {chosen}" if name in ("by", "where") else chosen

    text = _choice(choices, rng)
    text = _until_settled(r"\{(\w+)\}", slot, text)
    text = _until_settled(r"\(([^()]*)\)", lambda match: _choice(match[1].split("|"), rng), text)
    words = f"{_choice(_BEFORE, rng)} {text} {_choice(_AFTER, rng)}".split()
    return " ".join(_misheard(words, _WORD_ERRORS[set_name], rng))


def _until_settled(pattern: str, replace: Callable[[re.Match[str]], str], text: str) -> str:
    while (replaced := re.sub(pattern, replace, text)) != text:
        text = replaced
    return text


def _misheard(words: list[str], share: float, rng: np.random.Generator) -> Iterator[str]:
    for word in words:
        if rng.random() >= share:
            yield word
        elif rng.random() < 0.6:  # else it is dropped
            yield _choice(_HEARD_AS.get(word, _HEARD_FOR_ANY).split("|"), rng)


def _choice(choices: "tuple[str, ...] | list[str]", rng: np.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]
