"""Synthetic customer feedback: ten topics, silos that write differently. Made text, of nobody.

Hard enough that a bag of words does not solve it: a record often names a second matter that is not its topic, and part of the
held-out records state their topic in words that no silo ever used, so that knowing the words is not enough.
Seeded, so that a demo can be repeated; nothing here protects anybody.
"""

from __future__ import annotations

import random

TOPICS: dict[str, tuple[tuple[str, ...], tuple[str, ...], str]] = {
    "billing": (
        ("I was charged twice this month", "the invoice shows an amount I never agreed to", "my card was debited although I had paid",
         "the sum on the bill is wrong", "you took 40 more than the price we settled", "there is a fee on my statement that nobody can explain",
         "the direct debit went out on the wrong day and doubled", "VAT was added two times on the receipt"),
        ("money left my account for something I did not buy", "the total you ask for does not add up", "I am paying for a service level I never had", "the numbers on what you want from me make no sense"),
        "the invoice",
    ),
    "delivery": (
        ("my parcel has not arrived", "the courier left the box with a stranger", "tracking has said out for delivery for five days",
         "the shipment went to my old address", "nobody rang the bell and the driver drove off", "the order is stuck in the depot",
         "it came two weeks after the promised date", "half of the packages never reached us"),
        ("I am still waiting at the door for what I ordered", "the van was seen in our street and turned round", "it was dropped at a house I have never been to", "the goods are somewhere between your warehouse and me"),
        "the courier",
    ),
    "defect": (
        ("the kettle stopped working after a day", "the screen has a crack and flickers", "one leg of the chair broke off",
         "the zip tore the first time I used it", "the motor makes a burning smell", "the battery is dead after an hour",
         "the paint peels off everywhere", "the lid does not close and it leaks"),
        ("it fell apart in my hands", "smoke came out when I switched it on", "the thing is useless, it simply will not start", "the seam came undone within the week"),
        "the machine",
    ),
    "refund": (
        ("I sent it back in May and have seen no money", "the refund you promised has not come", "I returned the shoes and the credit is missing",
         "you confirmed the return but never paid me back", "I want my deposit back", "the reimbursement is overdue by a month",
         "only part of the price was paid back", "my cancelled order was never reimbursed"),
        ("when will I see my cash again", "you have the item and also my money", "I was told ten days for the repayment and it is now forty", "give back what I spent, as agreed"),
        "the refund",
    ),
    "login": (
        ("I cannot sign in to my account", "the password reset mail never comes", "it says my user name is unknown",
         "the code for two step verification is refused", "I am locked out after one try", "my profile has vanished",
         "the account was blocked without a reason", "the login page throws me back to the start"),
        ("I no longer get past the front gate of your site", "your system does not recognise me any more", "the six digits you text me are never right", "somebody changed my credentials and I am shut out"),
        "my login",
    ),
    "app": (
        ("the app crashes when I open the basket", "since the update the phone freezes in your app", "the page stays white on my tablet",
         "notifications come in at night again and again", "the app drains the phone", "the map in the app does not load",
         "buttons do nothing after version 4", "syncing takes forever and then fails"),
        ("on my mobile it closes by itself", "the latest release made the software unusable", "I tap and tap and nothing on the display reacts", "it hangs on the spinning wheel on every device"),
        "the app",
    ),
    "staff": (
        ("the lady on the phone was rude", "the assistant in the shop ignored me", "your technician shouted at my mother",
         "I was laughed at by the agent", "the clerk hung up on me twice", "nobody at the counter wanted to help",
         "the consultant talked down to us", "your colleague made me feel stupid"),
        ("I have never been spoken to like that", "the person who served me could not be bothered", "manners seem to be unknown to the people you employ", "he rolled his eyes and walked away from me"),
        "the staff",
    ),
    "size": (
        ("the jacket is far too small although I took my size", "the trousers are two sizes too long", "the table is wider than the page says",
         "the ring does not fit my finger", "the shoes run narrow", "the curtains are shorter than ordered",
         "the mattress does not fit the frame", "medium turned out to be a child's shirt"),
        ("I could not get it over my shoulders", "my feet hurt after a minute in them", "the measurements you publish are fantasy", "it hangs off me like a tent"),
        "the size chart",
    ),
    "cancel": (
        ("I want to end my subscription", "please cancel my contract by the end of June", "I gave notice and it was renewed anyway",
         "there is no button to terminate the plan", "stop my membership now", "I do not wish to extend for another year",
         "the trial turned into a paid plan that I want to stop", "I revoke the order within fourteen days"),
        ("I am leaving, let me go", "take me off your books from next month", "I no longer want to be a customer of yours", "this agreement has to finish here"),
        "my contract",
    ),
    "stock": (
        ("the item is sold out again", "when will the blue one be available", "the site says in stock and then it is not",
         "you took my order for something you do not have", "the spare part cannot be had anywhere", "the waiting list does not move",
         "the article disappeared from the catalogue", "every shop near me has empty shelves"),
        ("I have been trying to buy it since spring and never can", "do you ever intend to make more of these", "there were none left, as always", "you advertise what nobody can get"),
        "availability",
    ),
}  # fmt: skip
LABELS = tuple(sorted(TOPICS))

_OPENERS = (
    ("Dear Sir or Madam,", "To whom it may concern:", "I am writing with regard to my order."),
    ("hi", "hey there", "hello??"),
    ("Ticket opened by branch.", "Customer states:", "Call note:"),
    ("So, um,", "Yeah hello,", "Right, it's me again,"),
)
_CLOSERS = (
    ("I look forward to your reply.", "Yours faithfully", "Kindly confirm in writing."),
    ("pls fix asap", "thx", "not happy tbh"),
    ("Please advise.", "Follow up in 2 days.", "Priority: normal."),
    ("you know what I mean.", "so that's that.", "can you look into it, yeah?"),
)
_ASIDES = (
    "{other} was fine this time",
    "no complaint about {other}",
    "{other} has been sorted out since",
    "I do not mean {other}",
    "last year it was {other}",
)


def make_silo(silo: int, count: int, seed: int, *, unseen: float = 0.0) -> list[dict[str, str]]:
    """Makes ``count`` records of one silo.

    Args:
        silo: Which of the four ways of writing (taken modulo four), and which topics prevail.
        count: Number of records.
        seed: Seed of the generator.
        unseen: Share of records that use phrases which training silos never use.

    Returns:
        Records with ``text``, ``label`` and ``silo``.
    """
    rng = random.Random(f"cloister-feedback-{seed}-{silo}-{count}")
    style = silo % 4
    weights = [3.0 if (i + silo) % 4 == 0 else 1.0 for i in range(len(LABELS))]
    rows = []
    for _ in range(count):
        label = rng.choices(LABELS, weights)[0]
        known, fresh, _ = TOPICS[label]
        phrase = rng.choice(fresh if rng.random() < unseen else known)
        parts = [phrase]
        if rng.random() < 0.6:
            aside = rng.choice(_ASIDES).format(other=TOPICS[rng.choice([t for t in LABELS if t != label])][2])
            parts.insert(rng.randrange(2), aside)
        body = ", ".join(parts) if style in (1, 3) else ". ".join(p[0].upper() + p[1:] for p in parts) + "."
        text = f"{rng.choice(_OPENERS[style])} {body} {rng.choice(_CLOSERS[style])}"
        rows.append({"text": text.lower() if style == 1 else text, "label": label, "silo": f"site-{silo + 1}"})
    return rows


def make_held_out(silos: int, count: int, seed: int) -> list[dict[str, str]]:
    """Held-out records over all silos' ways of writing; four in ten state their topic in words unseen in training."""
    rows = [row for silo in range(silos) for row in make_silo(silo, count // silos, seed + 1_000_003, unseen=0.4)]
    random.Random(seed).shuffle(rows)
    return rows
