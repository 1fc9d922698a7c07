"""Plain English for the tokenizer, all of it made here: word problems, instructions, everyday sentences.

The model never trains on this text. It only gives the tokenizer merges for ordinary words, so that a prompt
from another data set costs about one token per two characters instead of one per byte.
"""

from __future__ import annotations

import random

_WORDS = {
    "names": "Anna Ben Clara David Emma Frank Grace Henry Ivy Jack Kate Liam Mia Noah Olivia Paul Rosa Sam Tina Tom",
    "things": "apples books boxes cakes cars chairs coins cookies cups dogs dollars eggs flowers games hours letters "
    "marbles miles minutes oranges pages pencils pens people pounds shirts students tickets toys trees weeks",
    "places": "school the_store the_farm the_market the_library the_park work home the_office the_garden",
}
NAMES, THINGS, PLACES = (text.split() for text in _WORDS.values())

PROBLEMS = (
    "{a} has {n} {x}. {b} gives {a} {m} more {x}. How many {x} does {a} have now?",
    "{a} bought {n} {x} at {p} for ${m} each. How much money did {a} spend in total?",
    "There are {n} {x} in each of {m} rows. How many {x} are there altogether?",
    "{a} earns ${n} an hour and works {m} hours every day. How much does she earn in {k} days?",
    "{a} reads {n} pages a day. If the book has {m} pages, how many days will it take to finish the book?",
    "A store sells {x} for ${n}. If there is a discount of {m} percent, what is the price of {k} {x}?",
    "{a} had {n} {x} and gave {m} of them to his friends. Then he lost half of the rest. How many are left?",
    "{a} is twice as old as {b}. If {b} is {n} years old, how old will {a} be in {m} years?",
    "A train travels {n} miles in {m} hours. What is its average speed, and how far does it go in {k} hours?",
    "{a} and {b} went to {p} together. Each of them carried {n} {x}, and they sold {m} for ${k} each.",
    "On Monday {a} walked {n} miles to {p}. On Tuesday he walked three times as far. How far did he walk in all?",
    "If {n} {x} cost ${m}, then one costs ${m}/{n}. So the answer is the cost of {k} of them. #### {k}",
)

INSTRUCTIONS = (
    "You are a helpful assistant. Answer the question.",
    "Think step by step and put the final answer after ####.",
    "Solve the problem. Show your work, then write the answer on the last line.",
    "Please write a short answer to the following question.",
    "Use the tool when you need it, and give the result to the user.",
    "Guess a number between the two given values. The number is too high. The number is too low. Try again.",
    "Read the text, explain the reason, and choose the correct option from the list below.",
    "Write a function that takes a list of numbers and returns the sum of the largest two values.",
    "Your answer was not correct. Check each step, find the error and try another way.",
    "Let's first add the numbers, then subtract the cost, multiply by the rate and divide the total by the count.",
)

SENTENCES = (
    "The weather was good in the morning, but it started to rain before we came back from the market.",
    "She said that she would call her mother when the work was done, because they had not talked for some time.",
    "Most people know what they want to do, yet only a few of them know how it should be done.",
    "It is not always clear which of these is better; that depends on how much time and money there is.",
    "He took the old road through the hills, where the river turns and the houses stand close to the water.",
    "In the first part of the year there were more visitors than there had been in any other year before.",
    "We have been here since the beginning, and nothing about this place has changed except the people.",
    "Could you tell me where the next station is, and whether I still have enough time to get there?",
    "There is a simple rule: every number that ends in zero or five can be divided by five without a remainder.",
    "The children were playing with their friends while their parents made something to eat for everyone.",
    "After the teacher explained the question again, all of the students were able to find the answer themselves.",
    "This program reads one line at a time, counts the words, and prints the result when the file ends.",
    "They would have gone to the other side of the town, had they known that the shop was going to be closed.",
    "For example, if three workers need six days to build a wall, then six workers need only three days.",
    "I think that it will be possible to finish this by the end of the week, although there may be some changes.",
    "Each of the seven boxes was about the same size, but their weight was different, so we had to look inside.",
)


def problem(rng: random.Random) -> str:
    """One word problem, digits included."""
    a, b = rng.sample(NAMES, 2)
    n, m, k = (rng.randint(2, 99) for _ in range(3))
    thing, place = rng.choice(THINGS), rng.choice(PLACES).replace("_", " ")
    return rng.choice(PROBLEMS).format(a=a, b=b, n=n, m=m, k=k, x=thing, p=place)


def paragraph(rng: random.Random) -> str:
    """A few unrelated sentences: an instruction, two problems, one everyday sentence."""
    parts = [rng.choice(INSTRUCTIONS), problem(rng), problem(rng), rng.choice(SENTENCES)]
    rng.shuffle(parts)
    return " ".join(parts)
