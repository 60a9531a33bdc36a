"""Run: python -m pytest tests/test_watch.py. Runs that do not learn, and runs that do."""

import pytest
from conftest import train_in

from runtime.watch import Watch


def said(norms=(), validations=(), grey=11.0) -> list[str]:
    lines = []
    watch = Watch(lines.append)
    for step, norm in enumerate(norms, start=1):
        watch.gradient(step, norm)
    for number, psnr in enumerate(validations, start=1):
        watch.validation(50 * number, psnr, grey)
    return lines


def test_a_run_that_learns_is_left_alone():
    """Falling norms with single outliers, validations that rise with small drops, and runs under 50 steps."""
    norms = [5 / (1 + step / 50) + 100 * (step % 25 == 0) for step in range(400)]
    assert said(norms, [17, 19, 18.5, 21, 19.1, 23]) == []
    assert said([1.0] * 30 + [1000.0] * 15) == []         # too early for a median
    watch = Watch(pytest.fail)
    watch.validation(49, 4.5, 11.0)


def test_a_gradient_that_stays_high():
    """20 steps in a row above 10 times the median are named once, with numbers; 19 are not."""
    high = [2.0] * 60 + [32.0] * 19
    assert said(high) == []
    line, = said(high + [25.0] + [30.0] * 100)
    assert line.startswith("warning: step 80, this run is not learning: the gradient norm, 25, has been")
    assert "above 10 times its median, 2, for 20 steps" in line and "--warmup" in line


def test_a_validation_below_grey():
    """The collapse that was measured: 13.4 dB, then 4.5 dB where a grey image has 11."""
    line, = said(validations=[13.4, 4.5, 4.4])
    assert "step 100" in line and "4.50 dB, is below that of a grey image, 11.00 dB" in line


def test_a_validation_that_drops():
    """More than 3 dB below the best of this run."""
    line, = said(validations=[15.0, 18.0, 15.1, 14.9, 14.0])
    assert "step 200" in line and "fell to 14.90 dB from 18.00 dB" in line


@pytest.mark.parametrize("lr, steps, warns", [(5e-4, 60, False), (0.0, 60, True)])
def test_in_training(tmp_path, capsys, lr, steps, warns):
    """A run at rate 0 stays below a grey image and is told so; one that learns is not."""
    train_in(tmp_path, f"--lr {lr} --steps {steps} --val-count 4 --warmup 10 --clip 1 "
                       "--batch-size 4 --wavelet-weight 0 --gaussian-weight 0")
    out = capsys.readouterr().out
    assert out.count("this run is not learning") == warns
    assert not warns or "below that of a grey image" in out
