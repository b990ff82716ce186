"""How the learning rate goes, and when training has come to a standstill.

The rate is a tensor of the compiled step, a function of the number of updates. What depends on evaluations is a function of
their scores, so that a resumed run has nothing to remember but its history.
"""

import math

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="unet_fast")
class Schedule(keras.optimizers.schedules.LearningRateSchedule):
    """A learning rate that rises at first, and then stays or falls to 0 along half a cosine (Loshchilov & Hutter, 2017).

    Args:
        learning_rate: the highest.
        warmup: number of updates over which the rate rises linearly; the first has 1 / warmup of it.
        decay_steps: number of updates after which a cosine, which begins after the warm-up, is at 0; None for none.

    Attributes:
        factor: keras.Variable, 1 at first, by which the rate is multiplied.

    >>> from unet_fast.schedules import Schedule
    >>> schedule = Schedule(0.8, warmup=2, decay_steps=6)
    >>> [round(float(schedule(step)), 3) for step in range(7)]
    [0.4, 0.8, 0.8, 0.683, 0.4, 0.117, 0.0]
    """

    def __init__(self, learning_rate, warmup=0, decay_steps=None):
        self.learning_rate, self.warmup, self.decay_steps = learning_rate, warmup, decay_steps
        self.factor = keras.Variable(1.0, dtype="float32", trainable=False, name="factor")

    def __call__(self, step):
        step = ops.cast(step, "float32")
        rate = self.learning_rate * self.factor
        if self.warmup:
            rate = rate * ops.minimum((step + 1) / self.warmup, 1)
        if self.decay_steps is not None:
            done = (step - self.warmup) / max(self.decay_steps - self.warmup, 1)
            rate = rate * (1 + ops.cos(math.pi * ops.clip(done, 0, 1))) / 2
        return rate

    def get_config(self):
        return {"learning_rate": self.learning_rate, "warmup": self.warmup, "decay_steps": self.decay_steps}


def reductions(scores, patience):
    """How often the rate has been reduced on a plateau: each time that `patience` scores in a row were not the best so far.

    Args:
        scores: of the evaluations in their order, higher is better.
        patience: at least 1.

    >>> from unet_fast.schedules import reductions
    >>> reductions([0.5, 0.6, 0.6, 0.5, 0.7, 0.1, 0.1, 0.1, 0.1], patience=2)
    3
    """
    best, waited, count = -math.inf, 0, 0
    for score in scores:
        best, waited = (score, 0) if score > best else (best, waited + 1)
        if waited == patience:
            waited, count = 0, count + 1
    return count


def since_best(scores):
    """How many scores came after the first of the highest.

    >>> from unet_fast.schedules import since_best
    >>> since_best([0.5, 0.7, 0.6, 0.7])
    2
    """
    return len(scores) - 1 - scores.index(max(scores))
