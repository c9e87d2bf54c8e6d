"""Forms: filled-in fields, one box ticked of several, boxes ticked or not."""

from __future__ import annotations

import random

from .page import A4, GREY, RULE, Colour, DocumentQuestion, Page
from .words import CITIES, FIRST_NAMES, LAST_NAMES, date, date_answers, date_style, listed, street

__all__ = ["form"]

TITLES = listed(
    "Application for membership,Registration of a new patient,Change of address,Application for a library card,"
    "Registration for a course,Report of damage,Request for a parking permit",
    ",",
)
OCCUPATIONS = listed("baker,teacher,carpenter,nurse,engineer,gardener,librarian,driver,cook,painter,clerk,plumber", ",")
GROUPS: dict[str, tuple[str, ...]] = {
    "Delivery": ("by post", "by e-mail", "at the counter", "by courier"),
    "Payment": ("invoice", "direct debit", "credit card", "cash"),
    "Membership": ("single", "family", "student", "senior"),
    "Contact by": ("phone call", "letter", "text message", "any way"),
    "Language": ("English", "German", "French", "Spanish"),
    "Period": ("one month", "six months", "one year", "two years"),
    "Insurance": ("public", "private", "none", "through employer"),
    "Preferred time": ("morning", "noon", "afternoon", "evening"),
}
STATEMENTS = (
    "I have read the terms",
    "Send me the newsletter",
    "I am over 18 years old",
    "I need wheelchair access",
    "My data may be shared with partners",
    "I have been a member before",
    "Photographs may be published",
    "I wish to receive a receipt",
    "I have allergies",
    "A copy of my passport is attached",
)
_PENS: tuple[Colour, ...] = ((26, 54, 150), (20, 20, 60), (30, 30, 30))


def form(rng: random.Random, dpi: int) -> tuple[Page, list[DocumentQuestion]]:
    """Draws a filled-in form on an upright A4 sheet.

    Args:
        rng: what is on it.
        dpi: pixels an inch.

    Returns:
        The page, and what can be asked about it.
    """
    page, pen, crossed = Page(A4, dpi), rng.choice(_PENS), rng.random() < 0.5
    page.text((42, 66), rng.choice(TITLES), 15, bold=True)
    page.text((42, 82), "Please write clearly and tick what applies.", 7, colour=GREY)
    questions, bottom = _fields(rng, page, pen)
    y = bottom + 30.0
    for group in rng.sample(sorted(GROUPS), rng.randint(3, 5)):
        questions.append(_choice(rng, page, (group, y), pen, crossed))
        y += 38
    page.text((42, y), "Declarations", 9, bold=True)
    for statement in rng.sample(STATEMENTS, rng.randint(5, 8)):
        y += 19
        ticked = rng.random() < 0.5
        box = page.tick_box((46, y + 1), 9, ticked=ticked, crossed=crossed, colour=pen)
        label = page.text((64, y), statement, 8.5)
        text, answer = f'Is the box "{statement}" ticked?', "yes" if ticked else "no"
        questions.append(DocumentQuestion("form-box", text, (answer,), (box, label)))
    page.line([(42, 790), (250, 790)], 0.6, GREY)
    page.text((42, 801), "Date, signature", 6.5, colour=GREY)
    return page, questions


def _fields(rng: random.Random, page: Page, pen: Colour) -> tuple[list[DocumentQuestion], float]:
    """Fields in two columns, and where they end."""
    day = date_answers(date(rng, date(rng).replace(year=rng.randint(1940, 2004), day=1), 28), date_style(rng))
    first, last = rng.choice(FIRST_NAMES), rng.choice(LAST_NAMES)
    values: dict[str, tuple[str, ...]] = {
        "Last name": (last,),
        "First name": (first,),
        "Date of birth": day,
        "Street and number": (street(rng),),
        "Postcode": (str(rng.randint(10000, 99999)),),
        "City": (rng.choice(CITIES),),
        "Telephone": (f"0{rng.randint(100, 999)} {rng.randint(100000, 999999)}",),
        "E-mail": (f"{first.lower()}.{last.lower()}@{rng.choice(('post', 'mail', 'web'))}.example",),
        "Occupation": (rng.choice(OCCUPATIONS),),
        "Reference number": (f"{rng.choice('CHMRTX')}-{rng.randrange(10**4, 10**5)}",),
    }
    names, questions, y = rng.sample(sorted(values), rng.randint(7, 10)), [], 0.0
    for number, name in enumerate(names):
        x, y = (42.0, 306.0)[number % 2], 112.0 + 36 * (number // 2)
        label = page.text((x, y), name, 7, colour=GREY)
        value = page.text((x + 4, y + 15), values[name][0], 10, colour=pen)
        page.line([(x, y + 20), (x + 246, y + 20)], 0.6, RULE)
        text = f'What is entered in the field "{name}"?'
        questions.append(DocumentQuestion("form-field", text, values[name], (label, value)))
    return questions, y + 20


def _choice(rng: random.Random, page: Page, at: tuple[str, float], pen: Colour, crossed: bool) -> DocumentQuestion:
    """One group of options, one of them ticked."""
    name, y = at
    options = list(GROUPS[name])
    rng.shuffle(options)
    ticked = rng.randrange(len(options))
    marks = [page.text((42, y), name, 9, bold=True)]
    for number, option in enumerate(options):
        x = 46 + 127 * number
        marks.append(page.tick_box((x, y + 18), 9, ticked=number == ticked, crossed=crossed, colour=pen))
        marks.append(page.text((x + 16, y + 17), option, 8.5))
    about = (marks[0], marks[1 + 2 * ticked], marks[2 + 2 * ticked])
    return DocumentQuestion("form-choice", f'Which option is ticked under "{name}"?', (options[ticked],), about)
