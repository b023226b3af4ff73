"""Parser and argument types for command lines, shared by the command and the scripts of `training`."""

import argparse
import math
from collections.abc import Callable
from typing import Any

from .errors import UserError


class ArgumentParser(argparse.ArgumentParser):
    """`argparse` with one-line errors."""

    def error(self, message: str) -> Any:
        """Raise `UserError` instead of printing the usage."""
        raise UserError(f"{message} (see `{self.prog} --help`)")


def number(text: str) -> float:
    """A finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def spacing(text: str) -> float:
    """Side of a pixel in mm."""
    value = number(text)
    if not 0 < value <= 1000:
        raise argparse.ArgumentTypeError(f"{text} mm; accepted: more than 0, at most 1000")
    return value


def probability(text: str) -> float:
    """A number between 0 and 1, both excluded."""
    value = number(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text}; accepted: more than 0, less than 1")
    return value


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """Return a type for `argparse`: whole numbers from `low` to `high`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r}; accepted: a whole number from {low} to {high}")
        return value

    return parse
