"""What a test knows to be there, although its type says that it may not be."""

from __future__ import annotations

from typing import TypeVar

T = TypeVar("T")


def there(value: T | None) -> T:
    """The value; the test fails if there is none."""
    assert value is not None, "nothing is there"
    return value
