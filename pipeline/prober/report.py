"""What the prober found."""

from __future__ import annotations

from dataclasses import dataclass, field

CHECKS = {
    "answer leak": "a prediction depends on its own target or on a later token",
    "cross-sample leak": "a packed sample depends on another one",
    "packing": "a packed sample gets other logits than alone",
    "padding": "padding changes real tokens",
    "mask dtype": "the same mask in another dtype gives other logits",
    "training and generation": "the full forward and the forward over a prompt give other logits",
    "cached decoding": "decoding with a KV cache gives other logits than the full forward",
    "generate": "generate() gives other logits than the full forward",
    "loss": "a token is trained to predict another document or padding",
}
"""Every check by name, in the order of the report, with what it reports."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault."""

    check: str
    """A key of ``CHECKS``."""
    message: str
    """Where it was seen: row, tokens, layer."""
    layer: int | None = None
    """First decoder layer, counted from 1, after which the fault is visible; None if unknown."""
    path: tuple[int, ...] = ()
    """Token indices in the row, from the token that must not change to the one it reads; empty if unknown."""
    cause: str = ""
    """The likely cause, where a second run isolated it."""

    def __str__(self) -> str:
        return f"{self.check}: {self.message}{f'; {self.cause}' if self.cause else ''}"


@dataclass
class Report:
    """The result of :func:`pipeline.prober.probe`."""

    findings: list[Finding] = field(default_factory=list)
    checked: dict[str, int] = field(default_factory=dict)
    """Comparisons made, by check."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Checks that could not run, with the reason."""

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def count(self, check: str, comparisons: int = 1) -> None:
        """Record comparisons of a check."""
        self.checked[check] = self.checked.get(check, 0) + comparisons

    def skip(self, check: str, reason: str) -> None:
        """Record that a check could not run on some batch."""
        self.skipped.setdefault(check, reason)

    def result(self, check: str) -> str:
        """Return ``FOUND``, ``ok`` or ``skipped``."""
        if any(finding.check == check for finding in self.findings):
            return "FOUND"
        return "ok" if self.checked.get(check) else "skipped"

    def details(self, check: str) -> str:
        """Return one line: what was found, how much was compared, or why it was not."""
        found = [finding for finding in self.findings if finding.check == check]
        if found:
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            return f"{found[0].message}{f'; {found[0].cause}' if found[0].cause else ''}{more}"
        if self.checked.get(check):
            return f"{self.checked[check]} comparisons"
        return self.skipped.get(check, "nothing to compare in these batches")
