"""Invented names and dates, in ASCII."""

from __future__ import annotations

import datetime
import random
from typing import Literal

__all__ = [
    "CITIES",
    "COMPANIES",
    "PRODUCTS",
    "DateStyle",
    "date",
    "date_answers",
    "date_style",
    "listed",
    "person",
    "street",
]


def listed(text: str, between: str = " ") -> tuple[str, ...]:
    """Words or phrases that stand in one text."""
    return tuple(text.split(between))


FIRST_NAMES = listed(
    "Anna Bela Carl Dora Emil Fanny Georg Hanna Igor Jana Karim Lena Marco Nadia Oskar Paula Quentin Rosa Stefan Tilda "
    "Ugo Vera Walter Xenia Yusuf Zelda Amir Bruno Clara Dmitri Elsa Felix Greta Hugo Ines Jonas"
)
LAST_NAMES = listed(
    "Abel Berger Castell Dorn Engel Falk Gruber Holm Ivers Jansen Kessler Lorenz Maurer Novak Olsen Pfeifer Quint "
    "Reuter Sander Thoma Ulrich Vogel Winter Zeller Brandt Cordes Ebert Fiedler Hartig Kolb Lindner Marten Nagel Otten "
    "Petrov Roth Stein Tiller"
)
CITIES = listed(
    "Altmar Bergholt Cranby Dornfeld Elmstead Farrow Gladmoor Halvik Ingleby Jarnow Kelburn Lindau Morvel Nordby "
    "Oakhaven Penrith Quarley Rosmark Selwick Thornby Ulmen Varnholt Westmere Yarden Zelnik Ashcombe Brunnen Corwen "
    "Drumlin Eskdale Fenwick Grantham Holbeck Istrad Kirkby Langholm"
)
STREETS = listed("Mill Station Church Garden Harbour Market Forest School River Castle Bridge Orchard Meadow Chapel")
COMPANIES = listed(
    "Northwind Supplies,Alder & Sons,Blue Harbour Trading,Cobalt Instruments,Fernhill Paper,Granite Tools,"
    "Hollis Office,Ironbridge Parts,Juniper Textiles,Kestrel Print,Larkspur Lighting,Meridian Foods,Oakline Furniture,"
    "Pinnacle Optics",
    ",",
)
PRODUCTS = listed(
    "Desk lamp,Paper shredder,Whiteboard,Office chair,Filing cabinet,Laser printer,Label maker,Envelope box,"
    "Stapler,Hole punch,Toner cartridge,USB hub,Network cable,Keyboard,Monitor arm,Headset,Webcam,Extension lead,"
    "Coat stand,Wall clock,Waste bin,First aid kit,Fire blanket,Tool case,Step ladder,Hand truck,Packing tape,"
    "Bubble wrap,Pallet cover,Safety gloves,Ear plugs,Floor mat,Door stop,Key cabinet,Cash box,Notice board",
    ",",
)
FIRST_DAY = datetime.date(2018, 1, 1)
MONTHS = listed("January February March April May June July August September October November December")
DateStyle = Literal["long", "iso", "american", "dotted"]


def person(rng: random.Random) -> str:
    """First and last name."""
    return f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}"


def street(rng: random.Random) -> str:
    """Street and number."""
    return f"{rng.choice(STREETS)} {rng.choice(('Street', 'Road', 'Lane'))} {rng.randint(1, 180)}"


def date(rng: random.Random, first: datetime.date = FIRST_DAY, days: int = 2500) -> datetime.date:
    """A day from some day on."""
    return first + datetime.timedelta(days=rng.randrange(days))


def date_style(rng: random.Random) -> DateStyle:
    """How a document writes dates."""
    styles: tuple[DateStyle, ...] = ("long", "iso", "american", "dotted")
    return rng.choice(styles)


def date_answers(day: datetime.date, style: DateStyle) -> tuple[str, ...]:
    """A date as a document writes it, then the other ways of writing it that cannot be mistaken."""
    month, short = MONTHS[day.month - 1], MONTHS[day.month - 1][:3]
    ways = {
        "long": f"{day.day} {month} {day.year}",
        "iso": day.isoformat(),
        "american": f"{short} {day.day}, {day.year}",
        "dotted": f"{day.day:02d}.{day.month:02d}.{day.year}",
    }
    others = (ways["iso"], ways["long"], f"{month} {day.day}, {day.year}", f"{day.day} {short} {day.year}")
    return tuple(dict.fromkeys((ways[style], *others, ways["american"])))
