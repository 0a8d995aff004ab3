"""How sequence length and batch grow over a run, as functions of the step alone.

Short sequences first, since attention and long documents cost most and teach least at the start
(Devlin et al. 2018, appendix A.2: nine tenths of the steps at 128, the rest at 512); small batches
first, since early gradients agree anyway (Geiping and Goldstein 2022, arXiv:2212.14034).
"""

from __future__ import annotations

from dataclasses import dataclass

from fastbert.errors import InputError


@dataclass(frozen=True)
class Curriculum:
    """Length and batch of every step.

    Attributes:
        max_seq_len: tokens a sequence at most, in the end.
        accumulation: batches an optimiser step, in the end.
        steps: of the run; None where time ends it.
        first_seq_len, first_accumulation: at the start; None for those of the end.
        first_share: of the steps at the first length, and batch where `ramp_share` is 0.
        ramp_share: of the steps over which the batch grows straight to its end.
    """

    max_seq_len: int
    accumulation: int = 1
    steps: int | None = None
    first_seq_len: int | None = None
    first_accumulation: int | None = None
    first_share: float = 0.9
    ramp_share: float = 0.0

    def __post_init__(self) -> None:
        for flag, share in (("first-share", self.first_share), ("ramp-share", self.ramp_share)):
            if not 0.0 <= share <= 1.0:
                raise InputError(f"--{flag} must be in [0, 1], got {share}")
        for flag, first, name, last in (
            ("first-seq-len", self.first_seq_len, "max-seq-len", self.max_seq_len),
            ("first-accumulation", self.first_accumulation, "accumulation", self.accumulation),
        ):
            if first is not None and not 0 < first <= last:
                raise InputError(f"--{flag} must be 1 to --{name} ({last}), got {first}")
            if first is not None and self.steps is None:
                raise InputError(f"--{flag} needs --max-steps: time decides no batch")
        if self.first_seq_len is not None and self.first_seq_len < 8:
            raise InputError(f"--first-seq-len must be at least 8, got {self.first_seq_len}")
        if self.ramp_share and self.first_accumulation is None:
            raise InputError("--ramp-share: --first-accumulation says what the batch grows from")

    @property
    def longer_at(self) -> int:
        """The first step at full length."""
        if self.first_seq_len is None or self.steps is None:
            return 0
        return round(self.first_share * self.steps)

    def seq_len_at(self, step: int) -> int:
        """Tokens a sequence at most."""
        if self.first_seq_len is None or step >= self.longer_at:
            return self.max_seq_len
        return self.first_seq_len

    def accumulation_at(self, step: int) -> int:
        """Batches an optimiser step."""
        first, steps = self.first_accumulation, self.steps
        if first is None or steps is None:
            return self.accumulation
        if not self.ramp_share:
            return first if step < round(self.first_share * steps) else self.accumulation
        done = min(step / max(self.ramp_share * steps, 1.0), 1.0)
        return round(first + done * (self.accumulation - first))

    @property
    def mean_accumulation(self) -> float:
        """Batches a step over the whole run, for budgets in tokens."""
        if self.first_accumulation is None:
            return float(self.accumulation)
        below = self.ramp_share / 2 or self.first_share
        return self.accumulation - below * (self.accumulation - self.first_accumulation)
