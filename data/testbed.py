"""Write the two testbed sets: prompts whose answers have a reward that is known exactly (VADER's sentiment).

`reviews` are single turns, `chats` have several. Templates and a list of things make the prompts; a thing belongs to
one split, and (but for one of `reward`) has no word that VADER scores: no prompt asks for praise or for blame. Test
prompts carry two of four answers sampled from SmolLM2-135M-Instruct, the one with the highest sentiment and the one
with the lowest, in this order.

Reads   `data/testbed/samples.jsonl.gz`: the model's answers to the reward and the test prompts
Writes  `data/testbed/{reviews,chats}_{train,test,reward}.jsonl` (prompts; `topic` is the thing; test: `responses`,
        `truncated` in parallel, `difference` of their sentiments)
Run     .venv-train/bin/python data/testbed.py           # the same files, byte for byte; no model is needed

Only new samples need the model, by the ordinary generation stage:

    .venv-train/bin/python data/testbed.py recipe runs/testbed    # the recipe and its two prompts files
    .venv-infer/bin/python -m generation.generate runs/testbed/recipe.yaml
    .venv-train/bin/python data/testbed.py pack runs/testbed      # its candidates become samples.jsonl.gz
"""

import argparse
import gzip
import json
import random
from itertools import cycle, product
from operator import itemgetter
from pathlib import Path
from statistics import mean, stdev

import yaml

from annotation.train_reward import truth
from hps.errors import InputError, run_main
from pipeline.files import write_atomic
from pipeline.records import prompt_id, read_candidates, read_jsonl
from tools.embedded import LANGUAGE_MODEL, MODELS

SEED = 19
SETS = ("reviews", "chats")
FOLDER = Path(__file__).resolve().parent / "testbed"
SAMPLES = "samples.jsonl.gz"
SPLITS = {"train": 11, "test": 7, "reward": 7}  # things of each kind
PROMPTS = {"train": 440, "test": 310, "reward": 140}  # of each set; of the test prompts the first TEST are kept ...
TEST = 300
LEAST = 0.05  # ... whose two answers differ by as much in sentiment

# Every thing is a singular noun phrase that reads well after "about", "think of" and "how was".
THINGS = {
    "food": """the bakery on the corner; the pizza place by the station; the canteen at work; the soup at the diner;
        the new ice cream stand; the breakfast at the hotel; the sandwich from the machine; the coffee on the train;
        the vegetarian burger; the fish counter at the market; the tea house upstairs; the taco truck; the school lunch;
        the buffet on the ferry; the noodle bar; the cheese counter; the chocolate cake from the freezer;
        the instant porridge; the beer garden by the river; the curry in the food court; the bread machine;
        the sushi delivery; the airline meal; the orange juice in a carton; the pancake house""",
    "travel": """the night bus; the ferry crossing; the airport hotel; the rental car; the early morning flight;
        the train to the coast; the camp site by the lake; the youth hostel; the city tour on foot;
        the taxi ride; the cable car; the subway at rush hour; the overnight train;
        the parking garage downtown; the bike lane on our street; the motorway petrol station;
        the harbour walk; the week in the caravan; the cruise along the river; the window seat;
        the passport control; the walk to school; the roundabout near the mall; the road trip;
        the airport shuttle""",
    "services": """the dentist appointment; the haircut; the queue at the post office; the phone call with the bank;
        the plumber; the car wash; the laundromat; the eye test; the parcel delivery; the library card office;
        the tax form; the repair shop for bicycles; the moving company; the driving lesson; the blood test;
        the waiting room at the clinic; the locksmith; the vet; the ticket machine; the house painter;
        the call centre of the phone company; the piano lesson; the swimming class; the tailor; the babysitter""",
    "gadgets": """the old printer at work; the vacuum robot; the electric toothbrush; the cheap headphones;
        the wrist watch; the kitchen clock; the coffee grinder; the new phone; the office chair; the laptop bag;
        the electric kettle; the dishwasher; the washing machine; the bicycle pump; the desk lamp; the e-book reader;
        the keyboard with loud keys; the sewing machine; the lawn mower; the toaster; the camera drone;
        the digital piano; the space heater; the shower head; the label maker""",
    "culture": """the village concert; the film about the moon landing; the thick novel; the school musical;
        the museum of clocks; the opera; the puppet theatre; the crossword in the paper; the poetry evening;
        the documentary about ants; the chess club; the street musician; the photo exhibition; the quiz night;
        the radio show; the board game about trains; the dance class; the second season of the series;
        the history podcast; the school choir; the pottery course; the drum kit next door; the card game; the book club;
        the sculpture in front of the town hall""",
    "outdoors": """the rain this weekend; the walk in the forest; the public swimming pool; the beach in November;
        the ski slope; the city park; the hike up the hill; the garden shed; the fishing trip; the snow in April;
        the heat wave; the playground; the football match; the picnic; the zoo; the community garden;
        the fog on the way to work; the campfire; the bird house; the running track; the climbing wall; the rowing boat;
        the morning jog; the flea market; the boat ramp""",
    "home": """the flat upstairs; the new carpet; the sofa bed; the kitchen sink; the upstairs neighbour's piano;
        the bunk bed; the balcony; the elevator in our building; the laundry room in the basement; the new wallpaper;
        the kitchen table; the house plant; the puppy; the cat from the shelter; the attic; the garage door;
        the bathroom renovation; the street light outside; the doorbell; the stairs to the fifth floor;
        the hamster; the mattress; the goldfish tank; the rubbish collection; the move to the new flat""",
    "work": """the Monday meeting; the team lunch; the job interview; the office move; the first day at work;
        the night shift; the open-plan office; the training course; the video conference; the new time sheet;
        the group project; the maths exam; the school trip; the parents' evening; the chemistry lecture;
        the typing course; the evacuation drill; the summer job; the staff newsletter; the new uniform;
        the online course; the office plant; the business trip; the language class; the company picnic""",
}

REVIEWS = (
    "Write two sentences of a review of {thing}.",
    "Write a review of {thing} in one sentence.",
    "Write a text message to your sister about {thing}, in one sentence.",
    "Write a diary line about {thing}.",
    "Write a short post about {thing}, in two sentences.",
    "Leave a comment about {thing} in one sentence.",
    "Tell a colleague about {thing} in two sentences.",
    "How was {thing}? Answer in one sentence.",
    "Say in one sentence what you think of {thing}.",
    "Write the first two sentences of a letter to the editor about {thing}.",
    'Your cousin writes: "How was {thing}?" Write one sentence back.',
)

OPENINGS = (
    "I want to talk about {thing}.",
    "Today it was {thing} again.",
    "Can we talk about {thing}?",
    "My brother told me about {thing}.",
    "I am writing about {thing} for the local paper.",
    "Have you heard about {thing}?",
)
REPLIES = (
    "Yes. What do you want to know?",
    "I know it. What about it?",
    "Go on, I am listening.",
    "Yes, I was there last week.",
    "I remember it. What is your question?",
)
MIDDLES = (
    ("Was it your first time?", "No, it was my second time."),
    ("When was that?", "It was on Tuesday, before noon."),
    ("Were you there alone?", "No, my cousin was with me."),
    ("Do other people talk about it?", "Yes, half the street talks about it."),
)
QUESTIONS = (
    "What did you think of {thing}? Answer in one sentence.",
    "How was {thing}? Answer in two sentences.",
    "Write two sentences of a review of {thing}.",
    "Tell me in one sentence how {thing} was.",
    "Write one sentence about {thing} that I can send to my sister.",
    "What would you tell a neighbour about {thing}? Answer in one sentence.",
    "Write a comment on {thing} in two sentences.",
    "Write a short post about {thing} for me, in two sentences.",
)


def splits() -> dict[str, list[str]]:
    """The things of each split, of every kind as many."""
    rng, found = random.Random(SEED), {split: [] for split in SPLITS}
    for text in THINGS.values():
        things = [" ".join(thing.split()) for thing in text.split(";")]
        rng.shuffle(things)
        for split, count in SPLITS.items():
            found[split] += things[:count]
            things = things[count:]
    return found


def prompts(name: str, split: str) -> list[dict]:
    """The prompts of a set and split; no two prompts of a thing have the same template for their last message."""
    rng, things = random.Random(f"{SEED} {name} {split}"), splits()[split]
    templates = REVIEWS if name == "reviews" else QUESTIONS
    grid = [(thing, last) for thing in things for last in rng.sample(templates, -(-PROMPTS[split] // len(things)))]
    rng.shuffle(grid)
    return [{"topic": thing, "prompt": _messages(name, thing, last, rng)} for thing, last in grid[: PROMPTS[split]]]


def _messages(name: str, thing: str, last: str, rng: random.Random) -> list[dict]:
    turns = [last]
    if name == "chats":
        middle = rng.choice(MIDDLES) if rng.random() < 0.5 else ()
        turns = [rng.choice(OPENINGS), *middle, rng.choice(REPLIES), last]
    roles = cycle(("user", "assistant"))
    return [{"role": role, "content": text.format(thing=thing)} for role, text in zip(roles, turns, strict=False)]


def sampled(records: list[dict], samples: dict[str, dict]) -> list[dict]:
    """The first `TEST` of the test prompts whose best and worst answer differ by `LEAST`, with these two answers."""
    found = []
    for record in records:
        sample = samples[prompt_id(record["prompt"])]
        rows = sorted(zip(truth(sample["responses"]), sample["responses"], sample["truncated"], strict=True))
        (low, worse, worse_cut), (high, better, better_cut) = rows[0], rows[-1]
        if round(high - low, 4) >= LEAST:
            pair = {"responses": [better, worse], "truncated": [better_cut, worse_cut]}
            found.append({**record, **pair, "difference": round(high - low, 4)})
    if len(found) < TEST:
        raise InputError(
            f"{len(found)} of {len(records)} test prompts have answers that differ by {LEAST}, {TEST} are needed",
            where=str(FOLDER / SAMPLES),
            remedy="raise PROMPTS['test'] in data/testbed.py and sample again",
        )
    return found[:TEST]


def read_samples(folder: Path = FOLDER) -> dict[str, dict]:
    """The model's answers by `prompt_id`: `responses` and `truncated`."""
    return {record["prompt_id"]: record for _, record in read_jsonl(folder / SAMPLES)}


def files(samples: dict[str, dict]) -> dict[str, str]:
    """Name and text of the six files, from the templates and the samples."""
    made = {}
    for name, split in product(SETS, SPLITS):
        records = prompts(name, split)
        made[f"{name}_{split}.jsonl"] = _lines(sampled(records, samples) if split == "test" else records)
    return made


def write_recipe(folder: Path) -> None:
    """The recipe of the generation stage, with the reward prompts in the place of training and all test prompts."""
    for split in ("reward", "test"):
        write_atomic(folder / f"{split}.jsonl", _lines([row for name in SETS for row in prompts(name, split)]))
    recipe = {
        "output": str(folder),
        "seed": SEED,
        "models": {"generator": {"path": str(MODELS / LANGUAGE_MODEL)}},
        "data": {
            "train": {"path": str(folder / "reward.jsonl"), "responses": 8},
            "test": {"path": str(folder / "test.jsonl"), "responses": 4},
        },
        "generation": {
            "temperature": 1.0,
            "max_prompt_tokens": 256,
            "max_new_tokens": 40,
            "dtype": "float32",
            "max_sequences": 128,
        },
    }
    write_atomic(folder / "recipe.yaml", yaml.safe_dump(recipe, sort_keys=False))


def pack(folder: Path) -> None:
    """Keep of the stage's candidates what is used here."""
    fields = ("prompt_id", "responses", "truncated")
    kept = []
    for split in ("train", "test"):
        found = (record for _, record in read_candidates(folder / "candidates" / f"{split}.jsonl"))
        kept += [{field: record[field] for field in fields} for record in sorted(found, key=itemgetter("prompt_id"))]
    (FOLDER / SAMPLES).write_bytes(gzip.compress(_lines(kept).encode(), mtime=0))


def measure(name: str, split: str, samples: dict[str, dict]) -> dict:
    """Of the answers to the prompts of a set and split: how many, and their true reward."""
    found = [samples[prompt_id(record["prompt"])] for record in prompts(name, split)]
    rewards = [truth(each["responses"]) for each in found]
    flat = [reward for each in rewards for reward in each]
    return {
        "prompts": len(found),
        "answers": len(flat),
        "mean": round(mean(flat), 3),
        "sd within a prompt": round(mean(stdev(each) for each in rewards), 3),
        "below 0": round(mean(reward < 0 for reward in flat), 3),
        "exactly 0": round(mean(reward == 0 for reward in flat), 3),
        "cut": round(mean(cut for each in found for cut in each["truncated"]), 3),
    }


def _lines(records: list[dict]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["files", "recipe", "pack"], default="files")
    parser.add_argument("folder", nargs="?", type=Path, help="of the generation stage")
    options = parser.parse_args()
    if (options.folder is None) != (options.what == "files"):
        parser.error("`recipe` and `pack` need a folder, `files` takes none")
    if options.what == "recipe":
        write_recipe(options.folder)
        return
    if options.what == "pack":
        pack(options.folder)
    samples = read_samples()
    for name, text in files(samples).items():
        write_atomic(FOLDER / name, text)
        print(f"testbed: {name}: {len(text.splitlines())} prompts")
    for name, split in product(SETS, ("reward", "test")):
        print(f"testbed: answers, {name}, {split}: {json.dumps(measure(name, split, samples))}")


if __name__ == "__main__":
    run_main(main)
