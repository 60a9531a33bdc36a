"""Detects runs that do not learn and prints a one-line warning.

It only reads numbers that the run already has and never affects the run. The thresholds are ours.
"""

from collections import deque
from collections.abc import Callable
from statistics import median

WINDOW = 500    # steps whose gradient norms enter the median
ENOUGH = 50     # steps before the first check
RATIO = 10      # multiple of the median
PATIENCE = 20   # steps in a row above it
DROP = 3.0      # dB below the best validation PSNR
ADVICE = "try a lower --lr, a longer --warmup, --clip 1 or --optimizer muon"


class Watch:
    """Checks gradient norms and validation scores; calls `say` with one line, once for each symptom."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.norms: deque[float] = deque(maxlen=WINDOW)
        self.high = 0                                     # steps in a row above RATIO times the median
        self.best = float("-inf")
        self.said: set[str] = set()

    def gradient(self, step: int, norm: float) -> None:
        """Checks the autoencoder's gradient norm; called at every step, in order."""
        usual = median(self.norms) if len(self.norms) >= ENOUGH else float("inf")
        self.high = self.high + 1 if norm > RATIO * usual else 0
        if self.high:
            if self.high == PATIENCE:
                self.tell("gradient", step, f"the gradient norm, {norm:.3g}, has been above {RATIO} times "
                                            f"its median, {usual:.3g}, for {PATIENCE} steps")
        else:
            self.norms.append(norm)                       # outliers would raise the median

    def validation(self, step: int, psnr: float, grey: float) -> None:
        """Checks a validation: PSNR of the raw weights and of a grey image, in dB."""
        if step < ENOUGH:
            return
        if psnr < grey:
            self.tell("grey", step, f"the validation PSNR, {psnr:.2f} dB, is below that of a grey image, "
                                    f"{grey:.2f} dB")
        elif psnr < self.best - DROP:
            self.tell("drop", step, f"the validation PSNR fell to {psnr:.2f} dB from {self.best:.2f} dB")
        self.best = max(self.best, psnr)

    def tell(self, symptom: str, step: int, what: str) -> None:
        if symptom not in self.said:
            self.said.add(symptom)
            self.say(f"warning: step {step}, this run is not learning: {what}; {ADVICE}")
