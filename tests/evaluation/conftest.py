"""What the tests of the report share: each figure is drawn once, however many pages it stands on."""

import pickle
from collections.abc import Callable
from functools import wraps

import pytest

from holoslide.evaluation import figures
from holoslide.evaluation.figures import Picture

DRAWN = ("per_epoch", "roc", "precision_recall", "by_module", "reliability", "spread", "by_run")


@pytest.fixture(scope="session")
def pictures() -> dict[bytes, Picture]:
    """What has been drawn, by all it was drawn from; a test that asks for a fresh drawing clears it."""
    return {}


@pytest.fixture(autouse=True)
def drawn_once(pictures: dict[bytes, Picture], monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred reports differ in a sentence, and drawing is nearly all that a report takes."""

    def once(draw: Callable[..., Picture]) -> Callable[..., Picture]:
        @wraps(draw)
        def drawn(*given: object, **named: object) -> Picture:
            key = pickle.dumps((draw.__name__, given, named))
            if key not in pictures:
                pictures[key] = draw(*given, **named)
            return pictures[key]

        return drawn

    for name in DRAWN:
        monkeypatch.setattr(figures, name, once(getattr(figures, name)))
