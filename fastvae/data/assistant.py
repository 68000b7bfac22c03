"""The embedded corpus: requests to the assistant of a car, from a grammar of known entropy.

Each sentence comes with its exact log-probability, its intent, its sentiment and its slots, so a model's
negative log-likelihood can be held against the lowest that any model can reach. To be comparable, a model
must know every word: `Vocabulary(AssistantGrammar().words())`.

To add an intent, give it a weight in `INTENTS` and a rule of its name in `RULES`, in the notation of
`fastvae.data.grammar`. `{ask}` and `{end}` stand around a command that starts with a bare verb ("take me
home"), `{lead}` and `{close}` around a question or statement; these carry the sentiment. The tests tell when
a change makes a sentence ambiguous, which would make the entropy inexact.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

from fastvae.data.grammar import Grammar

SENTIMENTS = ("polite", "neutral", "impatient")

# The weight of each intent, and of its polite, neutral and impatient wordings.
INTENTS: dict[str, tuple[float, tuple[float, float, float]]] = {
    "navigation": (16, (3, 5, 2)),
    "traffic": (7, (1, 4, 3)),
    "calendar": (11, (4, 5, 1)),
    "reminder": (9, (3, 6, 1)),
    "weather": (10, (2, 6, 1)),
    "call": (8, (3, 5, 2)),
    "message": (9, (4, 5, 2)),
    "music": (11, (2, 6, 3)),
    "climate": (8, (2, 4, 4)),
    "status": (7, (1, 5, 2)),
    "dining": (9, (4, 5, 2)),
    "smalltalk": (7, (4, 4, 2)),
}

# Sizes and seeds of the fixed splits.
SPLITS = {"train": (20_000, 1), "valid": (2_000, 2), "test": (2_000, 3)}


class Utterance(NamedTuple):
    """A request to the assistant.

    Attributes:
        text: lower-case words separated by single spaces.
        intent: a key of `INTENTS`.
        sentiment: one of `SENTIMENTS`.
        slots: the phrases that fill the request, by role (`{"destination": "the old station"}`).
        log_prob: exact log-probability of the text in nats.
    """

    text: str
    intent: str
    sentiment: str
    slots: dict[str, str]
    log_prob: float


class AssistantGrammar:
    """A source of in-car requests: samples, exact probabilities and exact entropy."""

    def __init__(self) -> None:
        self._kinds = [(intent, sentiment) for intent in INTENTS for sentiment in SENTIMENTS]
        self._grammar = Grammar(grammar_rules(), start="utterance")

    def generate(self, n: int, seed: int) -> list[Utterance]:
        """Draw n independent utterances; the same seed always gives the same ones.

        Raises:
            ValueError: n is negative.
        """
        if n < 0:
            raise ValueError(f"n must be at least 0, got {n}")
        generator = random.Random(seed)
        utterances = []
        for _ in range(n):
            sample = self._grammar.sample(generator)
            intent, sentiment = self._kinds[sample.alternative]
            utterances.append(Utterance(sample.text, intent, sentiment, sample.slots, sample.log_prob))
        return utterances

    def log_prob(self, text: str) -> float:
        """Give the exact log-probability of a text in nats, -inf if the grammar cannot say it."""
        return self._grammar.log_prob(text)

    def kind_of(self, text: str) -> tuple[str, str] | None:
        """Give intent and sentiment of a text, None if the grammar cannot say it."""
        alternative = self._grammar.alternative_of(text)
        return None if alternative is None else self._kinds[alternative]

    def entropy(self) -> float:
        """Give the exact entropy in nats a sentence: the mean NLL of a perfect model, `</s>` counted."""
        return self._grammar.entropy()

    def expected_length(self) -> float:
        """Give the exact mean number of words a sentence, without `<s>` and `</s>`."""
        return self._grammar.expected_length()

    def words(self) -> list[str]:
        """Give every word the grammar can say, sorted."""
        return self._grammar.words()

    def find_ambiguity(self) -> str | None:
        """Give the beginning of an ambiguous sentence, or None: a proof that the entropy is exact."""
        return self._grammar.find_ambiguity()


@cache
def assistant_grammar() -> AssistantGrammar:
    """Give the one shared AssistantGrammar."""
    return AssistantGrammar()


def assistant_utterances(split: str) -> list[Utterance]:
    """Give the fixed "train" (20,000), "valid" or "test" (2,000 each) utterances.

    The splits are independent samples, so a short sentence may be in more than one of them.

    Raises:
        ValueError: there is no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    return assistant_grammar().generate(*SPLITS[split])


def assistant_sentences(split: str) -> list[str]:
    """Give the texts of `assistant_utterances`."""
    return [utterance.text for utterance in assistant_utterances(split)]


def grammar_rules() -> dict[str, str | Sequence[str]]:
    """Give all rules: the intents in their sentiments, the templates and the word lists."""
    lines = []
    for intent, (weight, by_sentiment) in INTENTS.items():
        total = sum(by_sentiment)
        lines += [
            f"{weight * share / total!r} {{{intent}/{sentiment}}}"
            for sentiment, share in zip(SENTIMENTS, by_sentiment, strict=True)
        ]
    return {"utterance": "\n".join(lines), **RULES, **word_lists()}


def word_lists() -> dict[str, list[str]]:
    """Give the word lists as lists, with the names that are made of parts."""
    lists = {
        name: [phrase.strip() for phrase in (text.split(",") if "," in text else text.split())]
        for name, text in WORDS.items()
    }
    lists |= {name: _combine(*(part.split() for part in parts)) for name, parts in NAME_PARTS.items()}
    lists["relative's"] = [f"{relative}'s" for relative in lists["relative"]]
    return lists


def _combine(beginnings: list[str], endings: list[str]) -> list[str]:
    """Join each beginning with each ending; pairs of frequent parts come first."""
    ranked = sorted((i + j, i, j) for i in range(len(beginnings)) for j in range(len(endings)))
    return [beginnings[i] + endings[j] for _, i, j in ranked]


RULES: Mapping[str, str] = {
    # How a request is opened and closed: here the sentiment is heard.
    "ask/polite": """
        5 could you please
        4 please
        3 would you please
        2 can you please
        2 would you kindly
        2 i would like you to
        1 when you have a moment please
        1 i would be grateful if you could
        1 do you think you could
    """,
    "ask/neutral": """
        8 {}
        3 can you
        2 okay {assistant}
        2 hey {assistant}
        1 i need you to
        1 go ahead and
    """,
    "ask/impatient": """
        4 just
        2 come on
        2 i said
        2 hurry up and
        1 for the last time
        1 how hard is it to
        1 why won't you just
        1 stop wasting time and
    """,
    "lead/polite": """
        4 excuse me
        3 sorry to bother you but
        2 if you don't mind
        1 whenever you are ready
    """,
    "lead/neutral": """
        6 {}
        2 hey {assistant}
        2 so
        1 okay {assistant}
        1 by the way
    """,
    "lead/impatient": """
        3 come on
        2 for goodness sake
        2 i keep asking
        1 seriously
        1 wake up
    """,
    "end/polite": """
        6 {}
        3 thank you
        3 thanks
        2 thanks a lot
        2 if it's not too much trouble
        1 i really appreciate it
        1 that would be lovely
    """,
    "end/neutral": """
        12 {}
        1 for me
        1 then
        1 if you can
    """,
    "end/impatient": """
        4 {}
        3 right now
        2 immediately
        2 already
        1 and make it quick
        1 i don't have all day
        1 before i lose my patience
        1 how often must i repeat it
    """,
    "close/polite": """
        6 {}
        3 please
        3 thank you
        2 thanks
        1 if you happen to know
        1 i would love to know
    """,
    "close/neutral": """
        14 {}
        1 do you know
        1 i wonder
    """,
    "close/impatient": """
        5 {}
        2 answer me
        2 for once
        1 i don't have all day
        1 and be brief
        1 i asked you twice
    """,
    # The intents.
    "navigation": """
        6 {ask} take me to {destination: route} {end}
        4 {ask} navigate to {destination: route} {end}
        3 {ask} find the {preference: route_preference} way to {destination: place} {end}
        2 {ask} take me to {destination: place} but avoid {avoid: avoidable} {end}
        2 {ask} add a stop at {stop: place} {end}
        2 {ask} show me {category: plural_place} {relation: relation} {near: place} {end}
        2 {lead} how do i get to {destination: place} {close}
        2 {lead} how far is it to {destination: place} {close}
        1 {lead} where is the nearest {category: place_kind} {close}
    """,
    "traffic": """
        4 {lead} how is the traffic on {road: road} {close}
        3 {ask} check the traffic on {road: road} {end}
        3 {lead} is there {incident: incident} on {road: road} {close}
        2 {lead} why are we stuck on {road: road} {close}
        2 {ask} get us around the {incident: jam} on {road: road} {end}
        2 {lead} how long is the delay between {from: town} and {to: town} {close}
        1 {ask} warn me about {incident: incidents} on {road: road} {end}
    """,
    "calendar": """
        5 {ask} schedule {event: event} {event_time} {end}
        3 {ask} put {event: event} in my calendar {event_time} {end}
        3 {ask} move my {event: event_kind} to {date: date} {end}
        2 {ask} cancel my {event: event_kind} with {person: person} {end}
        2 {ask} invite {person: people} to my {event: event_kind} on {date: weekday} {end}
        3 {lead} when is my {event: event_kind} with {person: person} {close}
        2 {lead} what do i have planned for {date: date} {close}
        1 {lead} am i free {date: date} at {time: clock} {close}
    """,
    "event_time": """
        4 {date: date} at {time: clock}
        2 {date: date}
        1 at {time: clock}
    """,
    "event": """
        4 a {event_kind} with {people}
        3 a {event_kind}
        2 a {event_adjective} {event_kind} with {people}
        1 a {event_kind} about the {topic}
    """,
    "reminder": """
        5 {ask} remind me to {task: tasks} {date: date} {end}
        4 {ask} remind me to {task: tasks} at {time: clock} {end}
        2 {ask} remind me to {task: tasks} when we get to {place: place} {end}
        2 {ask} add {item: items} to my {list: list_kind} list {end}
        2 {ask} set a timer for {duration: duration} {end}
        1 {ask} wake me at {time: clock} {date: date} {end}
        1 {lead} what is on my {list: list_kind} list {close}
    """,
    "tasks": """
        5 {task}
        1 {task} and {tasks}
    """,
    "task": """
        5 buy {items}
        3 pick up {items}
        2 pick up my {relative} from {place}
        2 call {person}
        2 pay the {bill}
        1 water the {plant}
        1 feed the {pet}
        1 book the {event_kind}
        1 {chore}
    """,
    "weather": """
        5 {lead} will it {weather: weather_verb} in {town: town} {date: date} {close}
        4 {lead} what is the weather like in {town: town} {date: date} {close}
        3 {ask} give me the forecast for {town: town} {end}
        3 {ask} tell me how {weather: weather_adjective} it gets in {town: town} {date: date} {end}
        3 {lead} is it going to be {weather: weather_adjectives} {date: date} {close}
        2 {lead} do i need {gear: gear} {date: date} {close}
        1 {ask} warn me if there is {weather: weather_event} near {town: town} {end}
    """,
    "weather_adjectives": """
        3 {weather_adjective}
        1 {weather_adjective} and {weather_manner}
    """,
    "call": """
        6 {ask} call {person: person} {end}
        3 {ask} call {person: person} on {device: device} {end}
        2 {ask} phone the {person: profession} {end}
        2 {ask} ring {person: person} back {end}
        2 {ask} put {person: person} on speaker {end}
        1 {lead} did {person: person} call me {date: past} {close}
        1 {lead} who called me {date: past} {close}
        1 {ask} {call_action} the {call_kind} call {end}
    """,
    "message": """
        5 {ask} tell {person: people} that {message: news}
        3 {ask} text {person: people} that {message: news}
        3 {ask} send {person: person} a message saying {message: news}
        2 {ask} ask {person: person} whether {message: question}
        2 {ask} read me the {which: latest} message from {person: person} {end}
        1 {lead} did {person: person} answer my {which: latest} message {close}
        1 {ask} reply that {message: news}
    """,
    "news": """
        6 {fact}
        1 {fact} and {news}
        1 {first_name} says {news}
    """,
    "fact": """
        4 i'm running {minutes} minutes late
        3 i'm {state_of_mind}
        3 i will be at {place} at {clock}
        2 we need {items}
        2 i forgot the {item}
        2 the {event_kind} is {event_state}
        2 the {part} is {part_state}
        1 i'm stuck behind {obstacle}
        1 we are having {dish} for dinner
        1 i love {hobby}
    """,
    "question": """
        3 we need {items}
        2 the {event_kind} is still {event_state}
        2 {person} is coming {date}
        2 i should bring {items}
        1 it is {weather_adjective} in {town}
    """,
    "music": """
        5 {ask} play {artist: artists} {end}
        4 {ask} play some {genre: genre} {end}
        3 {ask} play {title: title} by {artist: artist} {end}
        3 {ask} play something {mood: mood} {end}
        2 {ask} put on some {mood: mood} {genre: genre} {end}
        2 {ask} turn {direction: direction} the {sound: sound} {end}
        1 {ask} skip this {genre: genre} song {end}
        1 {ask} play a podcast about {topic: interest} {end}
        1 {lead} who sings {title: title} {close}
        1 {ask} add {title: title} to my {mood: mood} playlist {end}
    """,
    "artists": """
        6 {artist}
        1 {first_name} {surname} and the {band_noun}
    """,
    "artist": """
        5 the {band_adjective} {band_noun}
        3 {first_name} {surname}
        2 {first_name} and the {band_noun}
        1 {band_adjective} {singer_title} {surname}
    """,
    "title": """
        3 {title_verb} in the {title_noun}
        2 {title_verb} under the {title_noun}
        2 {title_adjective} {title_noun}
        1 no more {title_noun}
    """,
    "climate": """
        4 {ask} set the temperature to {temperature: temperature} degrees {end}
        4 {ask} turn {switch: switch} the {device: climate_device} {end}
        3 {ask} make it {change: warmer} {zone: zone} {end}
        2 {lead} it is {degree: degree} {feeling: feeling} {zone: zone} {close}
        2 {ask} {move: window_action} the {device: window} {end}
        1 {ask} point the {device: vent} at my {body: body_part} {end}
        1 {lead} what is the temperature {zone: zone} {close}
    """,
    "status": """
        3 {lead} how much {fluid: fluid} do we have left {close}
        3 {ask} check the {part: part} {end}
        3 {lead} is the {part: part} {state: part_state} {close}
        2 {lead} what does the {colour: colour} {part: part} light mean {close}
        2 {lead} why is the {part: part} making a {noise: noise} noise {close}
        2 {lead} there is a {noise: noise} noise from the {part: part} {close}
        1 {lead} when is the next {service: service} due {close}
        1 {ask} send a report about the {part: parts} to the {person: car_service} {end}
    """,
    "parts": """
        2 {part}
        1 {part} and the {body_panel}
    """,
    "dining": """
        4 {ask} find {quality: quality} {cuisine: cuisine} restaurant {near_place} {end}
        3 {ask} book a table for {guests: guests} at {restaurant: restaurant} {date: date} {end}
        3 {lead} where can i get {dish: dishes} {near_place} {close}
        3 {ask} order {dish: dishes} from {restaurant: restaurant} {end}
        2 {lead} is {restaurant: restaurant} open {date: date} {close}
        1 {lead} does {restaurant: restaurant} serve {dish: dishes} {close}
        1 {lead} i'm in the mood for {dish: dishes} {close}
    """,
    "near_place": """
        3 {}
        2 {relation: relation} {near: place}
        1 in {near: town}
    """,
    "dishes": """
        6 {dish}
        2 {dish} with {side}
        1 {dish} with {side} and {sauce}
    """,
    "smalltalk": """
        4 {lead} what do you think about {topic: interest} {close}
        3 {ask} tell me a {kind: story_kind} about {topic: creature} {end}
        3 {opinion}
        2 {lead} do you prefer {topic: interest} or {other: sport} {close}
        2 {ask} tell me something about {topic: country} {end}
        1 {lead} have you ever been to {topic: country} {close}
        1 {lead} i'm feeling {mood: state_of_mind} {date: present} {close}
    """,
    "opinion/polite": """
        3 you are {very} {praise}
        2 thank you for your help with the {topic}
        1 it is a pleasure to drive with you {date: present}
    """,
    "opinion/neutral": """
        3 how are you {date: present}
        2 i like {topic: interest} and {other: sport}
        1 my {relative} likes {topic: interest}
    """,
    "opinion/impatient": """
        3 you are {very} {complaint}
        2 you never listen when i talk about {topic: interest}
        1 forget about the {topic}
    """,
    "interest": """
        3 {sport}
        4 {subject}
    """,
    # Places; "the cafe next to the pharmacy behind the station" may go on for ever.
    "route": """
        7 {place}
        1 {place} and then to {route}
        1 {place} by way of {town}
    """,
    "place": """
        5 the {place_kind}
        3 the {place_adjective} {place_kind}
        3 the {place_kind} {relation} {place}
        3 {house_number} {street}
        3 {town}
        2 my {relative's} {home}
    """,
    "house_number": """
        3 {digit}
        3 {ten}
        2 {ten} {digit}
    """,
    "street": """
        1 {street_name} {street_kind}
    """,
    "road": """
        3 {street}
        2 the {road_name}
        2 highway {digit}
        1 the road to {town}
        1 the {town} bypass
    """,
    # People.
    "people": """
        6 {person}
        1 {first_name} and my {relative}
    """,
    "person": """
        5 {first_name}
        3 {first_name} {surname}
        3 my {relative}
        1 {form_of_address} {surname}
        1 my {relative's} {colleague}
    """,
    # Times.
    "date": """
        5 {day}
        3 on {weekday}
        2 next {weekday}
        1 on the {ordinal} of {month}
    """,
    "clock": """
        4 {hour} o'clock
        3 {hour} {minute}
        2 half past {hour}
        1 quarter to {hour}
        1 noon
    """,
    "duration": """
        3 {minutes} minutes
        1 {digit} hours
    """,
    "items": """
        5 {item}
        1 {food} and {thing}
    """,
    "item": """
        3 {food}
        2 {thing}
    """,
}

# Word lists, most frequent first. Separated by commas where there is one, else by spaces.
WORDS: Mapping[str, str] = {
    "assistant": "nova iris juno atlas echo",
    # Roads and places.
    "route_preference": """fastest, shortest, quickest, safest, most scenic, quietest, least busy, greenest,
        cheapest, usual""",
    "avoidable": """the motorway, tolls, the ferry, the tunnel, the city centre, steep hills, the roadworks,
        gravel roads, the bridge, school zones, narrow lanes, left turns""",
    "relation": """next to, near, behind, across from, opposite, close to, in front of, beside,
        around the corner from, not far from, a block from, facing""",
    "place_kind": """station, pharmacy, supermarket, airport, hospital, bank, hotel, cafe, bakery, library,
        museum, school, park, cinema, gym, post office, church, mall, theatre, stadium, harbour, market,
        bookshop, butcher, florist, barber, zoo, university, courthouse, embassy, town hall, aquarium,
        planetarium, lighthouse, castle, cathedral, cemetery, campsite, car wash, workshop, dealership,
        warehouse, nursery, kindergarten, laundromat, dentist, optician, clinic, garage, depot, marina, pier,
        boathouse, vineyard, brewery, distillery, orchard, farmhouse, windmill, mosque, synagogue, temple,
        monastery, observatory, greenhouse, velodrome, skatepark, playground, amphitheatre, gallery, studio,
        auditorium, ballroom, casino, nightclub, tavern, bistro, creamery, delicatessen, greengrocer,
        fishmonger, hardware store, toyshop, jeweller, tailor, shoemaker, locksmith, pawnshop, stationer,
        tobacconist, newsagent, monument, fountain, obelisk, quarry, sawmill, foundry""",
    "plural_place": """parking spaces, charging stations, petrol stations, restaurants, coffee shops, toilets,
        hotels, hostels, cash machines, playgrounds, bakeries, pharmacies, bookshops, museums, viewpoints,
        picnic areas, garages, supermarkets, galleries, florists, laundries, waterfalls, beaches, trails""",
    "place_adjective": """nearest old new closest big little best main next other local cheapest medieval
        modern haunted famous central northern southern eastern western upper lower royal municipal""",
    "home": "house, place, office, apartment, flat, cottage, garden, cabin, farm",
    "street_name": """church station mill park maple oak victoria high elm queen's king's garden river cedar
        willow chestnut birch walnut poplar linden hazel laurel juniper magnolia sycamore hawthorn rowan holly
        ivy heather bluebell primrose lavender jasmine rosemary saffron clover thistle bramble sparrow swallow
        nightingale robin finch kingfisher heron falcon kestrel magpie lark wren badger fox otter beaver
        chapel abbey priory bishop cardinal tower bridge canal quay wharf lock anchor beacon signal foundry
        cooper potter weaver saddler tanner fletcher chandler miller cobbler merchant mason glover draper""",
    "street_kind": "street road avenue lane drive close square terrace crescent boulevard court row",
    "road_name": """ring road, motorway, coast road, old bridge, harbour tunnel, main street, northern bypass,
        valley road, toll road, flyover, expressway, mountain pass, causeway, airport link, market square,
        roundabout""",
    "incident": """an accident, a traffic jam, a road closure, a breakdown, any congestion, a diversion,
        a speed camera, black ice, a fallen tree, a landslide, a police check, flooding, a burst pipe,
        a stray cow, an oil spill, a parade""",
    "jam": """accident jam closure roadblock queue congestion pileup diversion breakdown flood marathon
        demonstration""",
    "incidents": """accidents jams closures cameras potholes roadworks delays diversions deer cyclists
        checkpoints""",
    # The calendar and things to do.
    "event_kind": """meeting, appointment, lunch, dinner, interview, workshop, review, phone call, checkup,
        training, haircut, party, conference, presentation, breakfast, rehearsal, lesson, seminar, briefing,
        audition, viewing, inspection, tournament, wedding, reunion, picnic, barbecue, recital, webinar,
        hearing, negotiation, brainstorm, retrospective, photo shoot, fitting, tasting, fundraiser, ceremony,
        gala, graduation, christening, banquet, massage, vaccination, blood test, debate, lecture,
        orientation, sleepover, excursion, regatta""",
    "event_adjective": """short quick long weekly monthly private secret confidential final formal regular
        virtual""",
    "topic": """budget project contract report proposal schedule holiday merger design invoice website
        campaign strategy survey audit deadline prototype catalogue newsletter insurance mortgage inheritance
        renovation relocation partnership forecast agenda logo exhibition shipment warranty""",
    "event_state": """cancelled, postponed, confirmed, over, happening, delayed, tonight, moving, optional,
        overbooked, full, open, boring, online""",
    "list_kind": "shopping packing wish reading grocery birthday guest gift travel birdwatching",
    "food": """milk bread eggs coffee wine cheese apples butter rice bananas tomatoes onions garlic carrots
        spinach mushrooms peppers cucumbers lettuce potatoes lemons limes oranges grapes strawberries
        blueberries cherries peaches plums pears mangoes pineapples walnuts almonds raisins honey jam
        marmalade mustard vinegar olives pasta noodles flour sugar salt cinnamon vanilla yoghurt cream tofu
        sausages ham bacon turkey salmon tuna shrimp cereal oatmeal crackers biscuits chocolate popcorn""",
    "thing": """batteries flowers stamps tickets sunscreen nappies toothpaste shampoo candles envelopes keys
        medicine bandages lightbulbs paint charcoal firewood detergent sponges napkins tissues scissors glue
        tape notebooks pencils crayons balloons ribbons umbrellas gloves scarves socks slippers blankets
        pillows towels screws nails hinges sandpaper fertiliser seeds mulch birdseed""",
    "bill": """rent, electricity bill, babysitter, water bill, phone bill, parking fine, gardener, taxes,
        plumber, deposit""",
    "plant": "plants roses herbs lawn orchids cactus bonsai ferns tulips",
    "pet": "cat dog fish rabbit hamster parrot tortoise chickens goldfish pony",
    "chore": """lock the door, take out the rubbish, charge the laptop, renew my passport, clean the car,
        do the laundry, walk the dog, check the mail, return the library books, empty the dishwasher,
        sweep the chimney, mow the grass, defrost the freezer, change the sheets, iron my shirt,
        back up my photos, sign the lease, vacuum the stairs""",
    # The weather.
    "weather_verb": "rain snow freeze drizzle clear thunder hail pour thaw storm",
    "weather_adjective": """cold warm sunny hot wet foggy cloudy icy stormy dry mild chilly misty freezing
        slippery rainy snowy muggy frosty overcast drizzly scorching hazy crisp sultry bleak""",
    "weather_manner": "windy humid breezy gusty bright unpleasant changeable",
    "weather_event": """a storm, heavy rain, black ice, fog, snow, hail, a heatwave, a hurricane,
        a thunderstorm, strong wind, a blizzard, flooding, a tornado, a sandstorm, lightning""",
    "gear": """an umbrella, a coat, sunglasses, winter tyres, a raincoat, snow chains, boots, a scarf,
        a sweater, a hat, warm socks, mittens, wellingtons, an ice scraper, thermal underwear""",
    # Calls and messages.
    "device": """his mobile, her mobile, speaker, the office phone, the landline, video, the private number,
        the satellite phone""",
    "profession": """doctor dentist garage office mechanic school plumber lawyer vet insurance electrician
        pharmacist accountant landlord babysitter hairdresser architect carpenter florist surgeon optician
        locksmith caterer photographer therapist tutor gardener janitor notary paediatrician physiotherapist
        dispatcher receptionist librarian coach principal""",
    "call_action": "answer decline mute record end resume forward",
    "call_kind": "incoming current waiting missed conference anonymous",
    "latest": "last latest first new second unread previous urgent long",
    "state_of_mind": """tired fine hungry busy happy sick bored lost sleepy sorry excited nervous stressed
        lonely cheerful exhausted relieved grumpy thirsty confused proud dizzy anxious optimistic homesick
        melancholy""",
    "obstacle": """a truck, a tractor, a bus, a caravan, a cyclist, a tram, a snowplough, a herd of sheep,
        a wedding convoy, an ambulance, a steamroller, a combine harvester""",
    # Music.
    "genre": """jazz, music, rock, pop, blues, classical, folk, techno, soul, country, reggae, hip hop, disco,
        funk, opera, punk, metal, swing, gospel, ambient, flamenco, tango, salsa, samba, bluegrass, house,
        trance, grunge, ska, electro, rap, baroque, bossa nova, indie, motown, afrobeat, polka, calypso, fado,
        dubstep, synthwave, lounge, ragtime, klezmer, shanty""",
    "mood": """relaxing happy upbeat calm romantic loud sad energetic quiet soothing cheerful funky dreamy
        gentle nostalgic festive mellow dramatic groovy danceable melancholic uplifting spooky playful""",
    "direction": "up down off",
    "sound": "volume music radio bass sound treble speakers subwoofer",
    "band_adjective": """velvet silver electric crimson golden broken midnight wild lonely blue hollow neon
        black white paper crystal scarlet wandering silent burning frozen flying dancing sleeping laughing
        whispering invisible cosmic atomic magnetic plastic wooden copper rusty dusty emerald indigo violet
        amber ivory marble granite thunderous gilded fearless reckless curious honest feral""",
    "band_noun": """lanterns wolves strangers shadows mirrors pilots tigers foxes ravens sailors prophets
        monkeys engines islands comets planets satellites rockets diamonds daggers arrows anchors bandits
        outlaws drifters dreamers lovers rebels saints sinners angels ghosts giants pirates nomads vagabonds
        poets painters butchers bakers sparrows seagulls pelicans panthers cobras scorpions lobsters beetles
        crickets antlers feathers umbrellas telegraphs typewriters radiators""",
    "singer_title": "joe mama papa doctor lady king queen sister uncle professor duke baron",
    "title_verb": """dancing running walking crying singing waiting falling dreaming drowning burning sailing
        driving hiding floating sleeping whistling kissing laughing howling wandering swaying stumbling""",
    "title_adjective": """endless sweet lonely golden broken electric distant purple secret final restless
        tender bitter fading forgotten stolen""",
    "title_noun": """rain dark night moonlight summer river city sun shadow snow storm desert garden mirror
        ocean forest winter stars smoke thunder sky valley twilight wilderness avalanche carousel labyrinth
        meadow starlight aurora paradise fire""",
    # The car.
    "temperature": """twenty, twenty one, twenty two, nineteen, eighteen, twenty three, twenty four,
        seventeen, sixteen, twenty five, fifteen""",
    "switch": "on off up down",
    "climate_device": """heating, air conditioning, fan, seat heater, defroster, ventilation,
        steering wheel heater, seat cooling, ioniser, humidifier, rear heater, air purifier""",
    "warmer": """warmer, cooler, a bit warmer, a bit cooler, colder, much warmer, less stuffy, fresher,
        much colder, cosier""",
    "zone": "in here, in the back, on my side, on the left, on the right, at the front, in the boot",
    "degree": "too, so, far too, really, a little, rather, unbearably, terribly, awfully",
    "feeling": "hot cold warm stuffy chilly humid freezing dry draughty clammy",
    "window_action": "open close lower raise clean tint defog lock",
    "window": """windows, sunroof, rear window, boot, passenger window, driver's window, windscreen, tailgate,
        convertible roof, sunshade, glovebox""",
    "vent": "fan, air, left vent, right vent, blower, airflow, centre vent",
    "body_part": "feet face hands legs knees neck back toes chest shoulders ankles",
    "fluid": """fuel, charge, oil, range, washer fluid, coolant, power, brake fluid, adblue, battery,
        antifreeze""",
    "part": """engine, battery, tyre pressure, brakes, oil level, gearbox, radiator, clutch, exhaust,
        steering, alternator, headlights, handbrake, suspension, windscreen wiper, ignition, airbag, seatbelt,
        horn, transmission, fuel pump, thermostat, catalyst, turbocharger, axle, differential, crankshaft,
        camshaft, carburettor, dashboard, speedometer, odometer, towbar, dipstick, fanbelt, sparkplug, piston,
        cylinder, manifold, silencer, accelerator, immobiliser, parking sensor, reversing camera, child lock,
        fuse box""",
    "body_panel": "bumper bonnet mudguard hubcap spoiler grille fender",
    "part_state": """okay broken leaking overheating loose low full worn charged locked cracked stuck rusted
        jammed frozen squeaky""",
    "colour": "red yellow orange flashing blue green white purple amber blinking",
    "noise": """strange loud funny rattling squeaking grinding knocking whistling clicking humming hissing
        rumbling banging buzzing gurgling scraping wheezing""",
    "service": """service, inspection, oil change, tyre change, safety check, software update, tune up,
        wheel alignment, recall""",
    "car_service": "garage mechanic dealer manufacturer insurance owner",
    # Food.
    "quality": """a good, a cheap, a nice, a quiet, a family friendly, a fancy, an affordable, a cosy,
        a highly rated, a romantic, a trendy, a traditional, a dog friendly""",
    "cuisine": """italian chinese indian thai mexican japanese greek french vegan spanish turkish korean
        vietnamese lebanese vegetarian moroccan ethiopian peruvian brazilian persian nepalese georgian
        hungarian polish portuguese cuban jamaican malaysian indonesian filipino hawaiian swedish danish
        bavarian sicilian tuscan cantonese argentinian caribbean""",
    "guests": "two four three six five eight seven ten twelve nine eleven twenty",
    "dish": """pizza, sushi, pancakes, burgers, soup, tacos, ramen, curry, steak, dumplings, lasagne, falafel,
        paella, ice cream, waffles, burritos, risotto, kebabs, chowder, sandwiches, hummus, croissants,
        bagels, fondue, gnocchi, ravioli, spaghetti, goulash, stew, meatballs, schnitzel, dim sum, tempura,
        pho, bibimbap, enchiladas, quesadillas, empanadas, ceviche, oysters, mussels, calamari, lobster, crab,
        trout, duck, lamb, venison, ribs, brisket, meatloaf, quiche, souffle, crepes, cheesecake, brownies,
        doughnuts, tiramisu, sorbet, pretzels, bratwurst, pierogi, borscht, moussaka, tagine, couscous,
        biryani, samosas""",
    "side": """fries, rice, salad, chips, extra cheese, potatoes, beans, vegetables, coleslaw, garlic bread,
        mushrooms, avocado, pickles, asparagus, broccoli, cabbage, corn, lentils, chickpeas""",
    "sauce": "ketchup gravy mayonnaise chutney guacamole mustard relish aioli",
    "restaurant": """the golden kettle, the blue lobster, mario's, the hungry fox, the copper pan,
        little saigon, the olive tree, bella napoli, the red dragon, casa lupita, the rusty spoon,
        the lotus garden, chez colette, the spice route, the smoky barrel, the drunken duck, the green pepper,
        noodle palace, the salty anchor, the laughing buddha, taverna kostas, the silver whisk, burger barn,
        the jolly baker, pho corner, the velvet fig, the humble radish, the crooked ladle, sakura house,
        the wandering chef, the tipsy goat, the burnt onion, the painted plate, the singing teapot,
        the hidden pantry, the brass monkey, maison dubois, the midnight diner""",
    # Small talk.
    "story_kind": "joke, story, riddle, fact, poem, limerick, rumour, legend, fable, bedtime story",
    "creature": """cats dogs penguins elephants robots dinosaurs pirates dragons unicorns horses cows ducks
        monkeys whales sharks dolphins octopuses owls bears wolves tigers lions giraffes zebras hippos rhinos
        kangaroos koalas pandas sloths hedgehogs squirrels rabbits mice hamsters frogs toads snakes lizards
        crocodiles turtles snails spiders bees ants butterflies flamingos peacocks ostriches parrots pigeons
        geese swans camels llamas donkeys goats aliens vampires wizards witches trolls mermaids astronauts
        lawyers plumbers dentists""",
    "country": """france japan italy canada iceland brazil norway egypt india spain china kenya peru greece
        mexico australia sweden ireland portugal finland morocco vietnam chile cuba nepal turkey austria
        belgium poland denmark hungary croatia argentina colombia bolivia ecuador jamaica tunisia ghana
        nigeria ethiopia tanzania uganda zambia botswana namibia madagascar thailand malaysia indonesia
        mongolia kazakhstan georgia armenia jordan lebanon scotland wales greenland antarctica""",
    "sport": """football tennis cycling hiking swimming sailing basketball cricket yoga climbing rowing
        surfing fencing badminton golf hockey rugby skiing snowboarding wrestling archery""",
    "subject": """politics cooking gardening poetry chess astronomy travel cinema photography robots history
        philosophy fashion chemistry knitting archaeology economics psychology painting pottery origami
        genealogy beekeeping birdwatching calligraphy carpentry juggling magic meditation mathematics biology
        physics geology linguistics mythology theology architecture sculpture typography journalism""",
    "hobby": """camping dancing reading baking karaoke fishing sleeping shopping skating painting jogging
        puzzles crosswords antiques crochet improv""",
    "very": "very so really quite incredibly truly absolutely terribly remarkably",
    "praise": """helpful kind clever funny smart patient polite wonderful brilliant charming thoughtful
        reliable delightful""",
    "complaint": """slow annoying useless stupid deaf stubborn rude confusing hopeless clueless infuriating
        incompetent dreadful""",
    # Times.
    "day": """tomorrow, tonight, this weekend, tomorrow morning, this evening, tomorrow night,
        the day after tomorrow, later""",
    "present": "today, this morning, tonight, lately, this afternoon",
    "past": "today, this morning, yesterday, this week, last night, this afternoon, last week, last friday",
    "weekday": "monday friday saturday tuesday thursday wednesday sunday",
    "ordinal": """first second third fifth tenth fourth sixth seventh eighth ninth eleventh twelfth fifteenth
        twentieth thirteenth fourteenth sixteenth seventeenth eighteenth nineteenth thirtieth""",
    "month": "june may march july september october april december january february august november",
    "hour": "eight nine ten seven six five three two four one twelve eleven",
    "minute": "thirty, fifteen, forty five, twenty, fifty, forty, ten, twenty five, thirty five, fifty five",
    "minutes": "five, ten, twenty, fifteen, thirty, two, forty, three, twenty five, four, fifty",
    "digit": "one two three four five six seven eight nine",
    "ten": "twenty thirty forty fifty sixty seventy eighty ninety",
    # People.
    "first_name": """anna ben maria tom lisa paul sarah david emma max julia peter laura daniel nina oliver
        clara jack sophie leo alice sam hannah martin eva felix grace simon lena adam helen mark rosa george
        mia henry ella victor olga ivan amira hugo priya omar yuki chen fatima carlos elena diego ingrid lars
        freya bjorn sanjay meera kofi amara tariq leila hassan noor mei hiroshi akiko jin luca giulia marco
        bianca pierre camille antoine margot klaus greta otto heidi anton vera boris natasha pavel milena
        zoltan ilona stefan andrea nathan rachel joshua miriam isaac naomi caleb abigail owen megan dylan
        bronwen angus fiona callum isla declan niamh cormac siobhan walter edith arthur agnes stanley mabel
        wilfred ethel winston beatrice""",
    "relative": """mother wife brother boss sister husband father friend neighbour mum dad aunt uncle cousin
        daughter son grandmother grandfather landlady roommate colleague teacher fiance niece nephew godmother
        stepfather twin flatmate trainer""",
    "colleague": """assistant secretary boss lawyer partner doctor driver tutor accountant agent nanny
        gardener bodyguard astrologer""",
    "form_of_address": "doctor professor mister missus captain judge reverend inspector colonel",
}

# Names made of parts: each beginning with each ending.
NAME_PARTS: Mapping[str, tuple[str, str]] = {
    "town": (
        "ash north oak mill stone green wood river king clay fair lang marsh raven hazel sun",
        "ford field bury bridge worth dale port mouth stead wick",
    ),
    "surname": (
        "har win bar thorn hol lock brad wal pem kel stan ald whit tre",
        "well ley more son man wick combe gate stead by",
    ),
}
