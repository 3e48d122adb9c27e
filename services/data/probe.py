"""The text-only probe (FACTS: label leak): can the label be told from words alone, without any picture? Pure.

Naive Bayes on word counts, learnt on half of the texts and tried on the other half. Texts are compared within a
situation only (say, a product and an action): which situations come up may depend on the label, as an inspector acts
on what he sees; the words that he uses in one may not.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Texts = Sequence[tuple[str, bool]]  # text, label

_DEVIATIONS = 2.58  # of a normal distribution: 99 % lie within


@dataclass(frozen=True)
class Probe:
    balanced_accuracy: float
    margin: float  # an honest set lies within 0.5 ± margin 99 times in 100

    @property
    def leaks(self) -> bool:
        return self.balanced_accuracy > 0.5 + self.margin


def probe(rows: Iterable[tuple[str, str, bool]]) -> Probe | None:
    """Rows of situation, text, label. None: no situation has texts of both labels in both halves."""
    situations: dict[str, list[tuple[str, bool]]] = defaultdict(list)
    for situation, text, label in rows:
        situations[situation].append((text, label))
    tried = accuracy = variance = 0.0
    for texts in situations.values():
        learnt, held = texts[::2], texts[1::2]
        if not (_both(learnt) and _both(held)):
            continue
        counts = Counter(label for _, label in held)
        accuracy += len(held) * _balanced_accuracy(learnt, held)
        # Of the mean of two shares, each at most as uncertain as a fair coin.
        variance += len(held) ** 2 * (1 / counts[False] + 1 / counts[True]) / 16
        tried += len(held)
    return Probe(accuracy / tried, _DEVIATIONS * math.sqrt(variance) / tried) if tried else None


def _balanced_accuracy(learnt: Texts, held: Texts) -> float:
    words: dict[bool, Counter[str]] = {False: Counter(), True: Counter()}
    for text, label in learnt:
        words[label].update(text.lower().split())
    size = len(set(words[False]) | set(words[True])) + 1
    totals = {label: sum(counts.values()) + size for label, counts in words.items()}
    right, seen = Counter[bool](), Counter[bool]()
    for text, label in held:
        seen[label] += 1
        odds = sum(
            math.log((words[True][word] + 1) / totals[True]) - math.log((words[False][word] + 1) / totals[False])
            for word in text.lower().split()
        )
        right[label] += (odds > 0) == label
    return (right[False] / seen[False] + right[True] / seen[True]) / 2


def _both(texts: Texts) -> bool:
    return len({label for _, label in texts}) == 2
