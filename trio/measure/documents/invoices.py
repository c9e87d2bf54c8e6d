"""Invoices: totals, fields, line items."""

from __future__ import annotations

import random

from .page import A4, GREY, RULE, Colour, DocumentQuestion, Page
from .words import CITIES, COMPANIES, PRODUCTS, date, date_answers, date_style, person, street

__all__ = ["invoice"]

#: Columns of the line items: what heads them, and where they lie; all but the first end there.
_COLUMNS = (("Description", 42.0), ("Quantity", 330.0), ("Unit price", 440.0), ("Amount", 553.0))
_TINTS: tuple[Colour, ...] = ((24, 24, 28), (22, 62, 122), (120, 30, 40), (20, 92, 70))


def invoice(rng: random.Random, dpi: int) -> tuple[Page, list[DocumentQuestion]]:
    """Draws an invoice on an upright A4 sheet.

    Args:
        rng: what is on it.
        dpi: pixels an inch.

    Returns:
        The page, and what can be asked about it.
    """
    page = Page(A4, dpi, rng.choice(((255, 255, 255), (252, 251, 247))))
    tint = rng.choice(_TINTS)
    page.text((42, 62), rng.choice(COMPANIES), 15, colour=tint, bold=True)
    page.text((553, 62), "INVOICE", 17, anchor="rs", colour=tint)
    page.text((42, 78), f"{street(rng)}, {rng.randint(10000, 99999)} {rng.choice(CITIES)}", 8, colour=GREY)
    page.text((42, 118), "Bill to", 8, colour=GREY)
    for number, line in enumerate((person(rng), street(rng), f"{rng.randint(10000, 99999)} {rng.choice(CITIES)}")):
        page.text((42, 132 + 13 * number), line)
    questions = _fields(rng, page)
    questions += _items(rng, page)
    small_print = (
        f"Payment by bank transfer. Account {rng.randrange(10**9, 10**10)}, code {rng.randrange(10**7, 10**8)}.",
        f"Goods remain our property until paid. Tax number {rng.randint(100, 999)}/{rng.randint(1000, 9999)}.",
    )
    for number, line in enumerate(small_print):
        page.text((42, 800 + 11 * number), line, 6.5, colour=GREY)
    return page, questions


def _fields(rng: random.Random, page: Page) -> list[DocumentQuestion]:
    """Numbers and dates at the upper right."""
    issued, style = date(rng), date_style(rng)
    due = date(rng, issued, 60)
    fields: dict[str, tuple[str, ...]] = {
        "Invoice number": (f"{rng.choice(('INV', 'RE', 'F'))}-{rng.randrange(10**4, 10**6)}",),
        "Invoice date": date_answers(issued, style),
        "Due date": date_answers(due, style),
        "Customer number": (str(rng.randrange(10**4, 10**6)),),
        "Order number": (f"{rng.choice('ABDKPS')}{rng.randrange(10**5, 10**6)}",),
    }
    order, questions = list(fields), []
    rng.shuffle(order)
    for row, name in enumerate(order):
        y = 118 + 15 * row
        label = page.text((360, y), name, 8.5, colour=GREY)
        value = page.text((553, y), fields[name][0], anchor="rs")
        text = f"What is the {name.lower()} of this invoice?"
        questions.append(DocumentQuestion("invoice-field", text, fields[name], (label, value)))
    return questions


def _items(rng: random.Random, page: Page) -> list[DocumentQuestion]:
    """The table of line items, and the totals below it."""
    currency = rng.choice(("$", "EUR ", "GBP ", "CHF "))
    products = rng.sample(PRODUCTS, rng.randint(3, 14))
    size, top = rng.uniform(7.5, 9.0), 232.0
    heads = [
        page.text((x, top), name, size, anchor="ls" if name == "Description" else "rs", bold=True)
        for name, x in _COLUMNS
    ]
    page.line([(42, top + 6), (553, top + 6)], 0.8, GREY)
    questions, subtotal = [], 0
    for row, product in enumerate(products, 1):
        y = top + 5 + 18 * row
        quantity, price = rng.randint(1, 24), rng.randint(150, 48_000)
        subtotal += quantity * price
        cells = (product, str(quantity), _money(price), _money(quantity * price))
        marks = [
            page.text((x, y), cell, size, anchor="rs" if column else "ls")
            for column, (cell, (_, x)) in enumerate(zip(cells, _COLUMNS, strict=True))
        ]
        page.line([(42, y + 6), (553, y + 6)], 0.4, RULE)
        for column, asked in (
            (1, f'What quantity of "{product}" is billed?'),
            (2, f'What is the unit price of "{product}"?'),
            (3, f'What is the amount of the line "{product}"?'),
        ):
            about = (marks[0], marks[column], heads[column])
            questions.append(DocumentQuestion("invoice-item", asked, (cells[column],), about, numeric=True))
    rate = rng.choice((5, 7, 8, 10, 19, 20, 21))
    tax = round(subtotal * rate / 100)
    lines = [("Subtotal", subtotal, "the subtotal"), (f"VAT {rate}%", tax, "the VAT")]
    total = subtotal + tax
    if rng.random() < 0.5:
        shipping = rng.randint(390, 4990)
        lines.append(("Shipping", shipping, "the shipping cost"))
        total += shipping
    lines.append(("Total due", total, "the total amount due"))
    y = top + 5 + 18 * len(products) + 12
    for number, (name, amount, words) in enumerate(lines, 1):
        last = number == len(lines)
        grown, place = (size + 1.5, y + 17.0 * number + 3) if last else (size, y + 17.0 * number)
        label = page.text((360, place), name, grown, bold=last)
        value = page.text((553, place), f"{currency}{_money(amount)}", grown, anchor="rs", bold=last)
        text, shown = f"How much is {words} on this invoice?", f"{currency}{_money(amount)}"
        questions.append(DocumentQuestion("invoice-total", text, (shown,), (label, value), numeric=True))
    return questions


def _money(cents: int) -> str:
    return f"{cents / 100:,.2f}"
