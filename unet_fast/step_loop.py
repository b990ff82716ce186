"""Training steps, launched one behind the other without waiting for their results.

Reading a loss back waits for the device and for the launch of the next step, which at 13 ms a step would be felt. So the
losses of a chunk of steps are read at its end; preparing and augmenting the batch is part of the step, and which batch it
takes is counted on the device: a launch has the same arguments as the one before, and XLA replays its CUDA graphs as they
are. Chunks are as long as a person waits without noticing, which leaves the device idle for well below a hundredth of the
time, between one chunk and the next. What is computed does not depend on where they end.
"""

import time

import tensorflow as tf

from unet_fast.data.pipeline import BLOCK_STEPS

_CHUNK_SECONDS = 0.5  # how long a chunk shall take: signals and the progress bar wait for its end


class StepLoop:
    """The steps of a training, from any number on.

    Args:
        model: FusedUNet; its `jit_compile` says whether XLA compiles the step.
        optimizer: keras.optimizers.Optimizer, built for the model's trainable variables.
        loss_fn: called with (labels uint8 [B, H, W], outputs [B, H, W, K]), and float32 weights [B] where the batches have
            them; returns the mean loss, a float32 scalar.
        batches: `unet_fast.data.TrainingBatches` of the model's sizes.
        start_step: number of the first step, at least 0.
        accumulate: in how many equal parts a batch is taken, one after the other; the optimizer gets the parts' mean
            gradient, once. Has to divide the size of the batches.

    Raises:
        UserError: a negative step.

    >>> from unet_fast import FusedUNet, losses
    >>> from unet_fast.data import Dataset, TrainingBatches, generate
    >>> from unet_fast.step_loop import StepLoop
    >>> import keras
    >>> model = FusedUNet((32, 32, 1), filters=2, depth=1, padding="same")
    >>> data = Dataset.from_arrays(*generate(5, size=(64, 64)))
    >>> batches = TrainingBatches(data, range(4), input_size=32, output_size=32, batch_size=2, seed=0)
    >>> optimizer = keras.optimizers.Adam()
    >>> optimizer.build(model.trainable_variables)
    >>> loop = StepLoop(model, optimizer, losses.DiceCrossEntropy(), batches, start_step=0)
    >>> len(loop.advance(5)) in range(1, 6)
    True
    """

    def __init__(self, model, optimizer, loss_fn, batches, start_step, accumulate=1):
        device = "GPU:0" if tf.config.list_logical_devices("GPU") else "CPU:0"
        self._optimizers, self._steps = [optimizer], [BlockSteps(device)]
        self._step = _make_step(model, optimizer, loss_fn, batches, *self._steps, accumulate)
        self._blocks = batches.blocks(start_step, device)
        self._block, self._position, self._length = None, 0, 0  # the block at hand, its steps done and in all
        self._chunk = 1  # steps; the first traces and compiles

    def advance(self, most):
        """Run a chunk of steps, as many as take half a second by what the last ones took, and wait for them.

        Args:
            most: the most steps to run, at least 1.

        Returns:
            list of the steps' losses, floats, one a step; not finite where the loss is not.
        """
        if self._position == self._length:
            self._begin(next(self._blocks))
        count = min(self._chunk, most, self._length - self._position)
        begin = time.monotonic()
        for _ in range(count):
            self._step(*self._block)
        losses = self._losses(self._position, self._position + count)
        fitting = int(count * _CHUNK_SECONDS / (time.monotonic() - begin))
        # A hitch shortens the next chunk at once; from one good measurement it only doubles.
        self._chunk = max(1, min(fitting, max(self._chunk, 2 * count)))
        self._position += count
        return losses

    def _losses(self, first, last):
        """The losses of the block's steps `first` up to `last`, a list of floats; waits for the step that ran last."""
        return self._steps[0].losses(first, last)

    def _begin(self, block):
        for steps in self._steps:
            steps.begin()
        self._block, self._position, self._length = block, 0, block[2].shape[0]

    def set_rate_factor(self, factor):
        """Multiplies the learning rate by a factor from now on; the optimizer is an `AdamL2` with a `Schedule`."""
        for optimizer in self._optimizers:
            getattr(optimizer, "inner_optimizer", optimizer).schedule.factor.assign(factor)


def _make_step(model, optimizer, loss_fn, batches, steps, accumulate):
    """A tf.function of a block of `TrainingBatches.blocks`: its next step by `steps`, a `BlockSteps`."""
    gradients = loss_and_gradients(model, optimizer, loss_fn, batches, accumulate)

    @tf.function(jit_compile=model.jit_compile, autograph=False)
    def step(images, masks, rows, draws):
        loss, computed = gradients(images, masks, *steps.take(rows, draws))
        optimizer.apply(computed, model.trainable_variables)
        steps.record(loss)

    return step


class BlockSteps:
    """How far a device is in its block, and the losses of the block's steps, both of which the steps themselves keep.

    A step whose arguments and results lie where those of the step before lay is a CUDA graph launched again as it is; a
    loss handed out by each would be in another place each time.

    Args:
        device: such as "GPU:0", where that is kept.

    Attributes:
        take: tf.function of a block's rows and draws: those of the next step.
    """

    def __init__(self, device):
        with tf.device(device):
            self._number = number = tf.Variable(0, trainable=False, dtype=tf.int64)
            self._losses = tf.Variable(tf.zeros(BLOCK_STEPS), trainable=False)

        # Compiled whatever becomes of the rest: else the number would go to the host, which would wait for it.
        @tf.function(jit_compile=True, autograph=False)
        def take(rows, draws):
            taken = tf.gather(rows, number), tf.gather(draws, number)
            number.assign_add(1)
            return taken

        self.take = take

    def begin(self):
        """The next step is the first of a block."""
        self._number.assign(0)

    def record(self, loss):
        """For a tf.function to trace: keeps the loss of the step that was taken last."""
        self._losses.scatter_update(tf.IndexedSlices(loss, self._number - 1))

    def losses(self, first, last):
        """The losses of steps `first` up to `last`, a list of floats; waits for the step that ran last."""
        return self._losses.numpy()[first:last].tolist()


def loss_and_gradients(model, optimizer, loss_fn, batches, accumulate=1, replicas=1):
    """What a step computes before the optimizer has its turn, for a tf.function to trace.

    Args:
        model, optimizer, loss_fn, batches, accumulate: as `StepLoop`.
        replicas: whose gradients will be added up, this one's among them.

    Returns:
        function of what `TrainingBatches.blocks` has for a step, (images, masks, rows [B], draws [B, D]); it returns the
        mean loss, a float32 scalar, and the gradients of the scaled loss, one a trainable variable: each the replica's
        share of the replicas' mean gradient.

    Example: see `StepLoop`.
    """

    # Compiled whatever becomes of the rest: TensorFlow's own kernels for a GPU gather no uint8, and XLA makes
    # a few kernels of what would be a hundred.
    @tf.function(jit_compile=True, autograph=False)
    def load(images, masks, rows, draws):
        return batches.prepare(tf.gather(images, rows), tf.gather(masks, rows), draws)

    variables = model.trainable_variables

    def gradients(images, masks, rows, draws):
        images, labels, *weights = load(images, masks, rows, draws)
        with tf.GradientTape() as tape:
            loss = loss_fn(labels, model(images, training=True), *weights)
            # Divided here and not behind, where it would be a pass over all gradients.
            scaled = optimizer.scale_loss(loss) / replicas
        return loss, tape.gradient(scaled, variables)

    def accumulated(images, masks, rows, draws):
        # Keras' own accumulation counts parts as steps, for which schedules and moving averages would then go on.
        rows, draws = (tf.reshape(part, (accumulate, -1, *part.shape[1:])) for part in (rows, draws))

        def body(i, *sums):
            loss, parts = gradients(images, masks, rows[i], draws[i])
            return i + 1, *(total + part for total, part in zip(sums, (loss, *parts), strict=True))

        start = (0, 0.0, *(tf.zeros(v.shape, v.dtype) for v in variables))
        _, *sums = tf.while_loop(
            lambda i, *_: i < accumulate, body, start, parallel_iterations=1, maximum_iterations=accumulate
        )
        loss, *parts = (total / accumulate for total in sums)
        return loss, parts

    return gradients if accumulate == 1 else accumulated
